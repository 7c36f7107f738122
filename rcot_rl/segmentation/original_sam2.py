"""Checkpoints of the original SAM2 (`sam2.1_hiera_large.pt`, …), read as transformers' Sam2Video.

Both implementations have the same architecture, so that loading one is a change of names. The eight
published checkpoints of SAM2 and SAM2.1 differ in their image encoder, which is recognized by its
shapes, and in two modules that SAM2.1 adds. Not supported: other image encoders.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import Sam2VideoConfig

from rcot_rl.errors import InputError

_ENCODERS: dict[tuple[int, int], dict[str, Any]] = {
    (96, 12): {},  # tiny: transformers' defaults
    (96, 16): {"blocks_per_stage": [1, 2, 11, 2], "global_attention_blocks": [7, 10, 13]},
    (112, 24): {
        "blocks_per_stage": [2, 3, 16, 3],
        "global_attention_blocks": [12, 16, 20],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "window_positional_embedding_background_size": [14, 14],
    },
    (144, 48): {
        "blocks_per_stage": [2, 6, 36, 4],
        "global_attention_blocks": [23, 33, 43],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "window_size_per_stage": [8, 4, 16, 8],
    },
}
"""Settings of the image encoders tiny, small, base-plus and large by width and number of blocks."""

_POSITIONS = "shared_embedding.positional_embedding"
_HEADS = r"((?:obj_ptr_proj|pred_obj_score_head|iou_prediction_head|hypernetworks_mlps\.\d+)\.)"
_RENAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
        (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
        (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
        (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
        (_HEADS + r"layers\.0\.", r"\1proj_in."),
        (_HEADS + r"layers\.1\.", r"\1layers.0."),
        (_HEADS + r"layers\.2\.", r"\1proj_out."),
        (r"^sam_prompt_encoder\.", "prompt_encoder."),
        (r"\.pe_layer\.positional_encoding_gaussian_matrix$", f".{_POSITIONS}"),
        (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
        (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
        (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
        (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
        (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
        (r"^sam_mask_decoder\.", "mask_decoder."),
        (r"\.output_upscaling\.0\.", ".upscale_conv1."),
        (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
        (r"\.output_upscaling\.3\.", ".upscale_conv2."),
        (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
        (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
        (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
        (r"\.mask_downsampler\.encoder\.12\.", ".mask_downsampler.final_conv."),
        *(
            (rf"\.encoder\.{3 * layer + place}\.", f".layers.{layer}.{part}.")
            for layer in range(4)
            for place, part in enumerate(("conv", "layer_norm"))
        ),
        (r"\.dwconv\.", ".depthwise_conv."),
        (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
        (r"\.gamma$", ".scale"),
        (r"\.out_proj\.", ".o_proj."),
        (r"\.norm(?=[\d._])", ".layer_norm"),
        (r"^obj_ptr_proj\.", "object_pointer_proj."),
        (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
        (r"^no_obj_ptr$", "no_object_pointer"),
        (r"^no_mem_embed$", "no_memory_embedding"),
        (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
        (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
        (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    )
]
_POINTS = [f"prompt_encoder.point_embeddings.{label}.weight" for label in range(4)]


def read_original(file: Path) -> tuple[Sam2VideoConfig, dict[str, torch.Tensor]]:
    """Return the configuration and the weights of a checkpoint file, in transformers' names.

    Runs no code from the file: only tensors are unpickled. Raises InputError.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile pickle can raise any
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot be read as a checkpoint: {reason}", file=file) from error
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        message = "must map names to tensors; not a checkpoint of SAM2"
        raise InputError(message, file=file, key="model")
    return original_config(weights, file), renamed(weights)


def original_config(weights: dict[str, torch.Tensor], file: Path) -> Sam2VideoConfig:
    """Return the configuration that fits the weights of a published checkpoint.

    Args:
        weights: Weights in the original names.
        file: For messages.

    Raises:
        InputError: It is none of the published ones.
    """
    embedding = weights.get("image_encoder.trunk.patch_embed.proj.bias")
    width = 0 if embedding is None else len(embedding)
    blocks = {name.split(".")[3] for name in weights if ".trunk.blocks." in name}
    encoder = _ENCODERS.get((width, len(blocks)))
    if encoder is None:
        raise InputError(
            f"has an image encoder of width {width} with {len(blocks)} blocks; expected that of "
            "SAM2 tiny, small, base-plus or large",
            file=file,
        )
    widths = [width << stage for stage in range(4)]
    backbone = {"hidden_size": width, "embed_dim_per_stage": widths, **encoder}
    return Sam2VideoConfig(
        vision_config={"backbone_config": backbone, "backbone_channel_list": widths[::-1]},
        enable_temporal_pos_encoding_for_object_pointers="obj_ptr_tpos_proj.weight" in weights,
        enable_occlusion_spatial_embedding="no_obj_embed_spatial" in weights,
    )


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights in transformers' names."""
    out = {new_name(name): value for name, value in weights.items()}
    # transformers has one table of point labels, and the positional matrix under two names
    if all(name in out for name in _POINTS):
        out["prompt_encoder.point_embed.weight"] = torch.cat([out.pop(name) for name in _POINTS])
    positions = out.get(f"prompt_encoder.{_POSITIONS}")
    if positions is not None:
        out["shared_image_embedding.positional_embedding"] = positions
    return out


def new_name(name: str) -> str:
    """Return transformers' name of a weight."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name
