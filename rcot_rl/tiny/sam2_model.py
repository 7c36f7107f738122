"""Configuration and initialization of a SAM2 that is small enough to train on one CPU core.

The architecture is that of SAM2 in transformers (Hiera, prompt encoder, mask decoder, memory
attention, memory encoder), with 2.2 million parameters instead of 39 million or more. Weights do
not depend on the image side, so training can start at 64 px and continue at 128 px. Left out:
several mask hypotheses per prompt, and mask prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Sam2VideoConfig, Sam2VideoModel
from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoMaskDecoderConfig

HIDDEN = 128
"""The smallest that runs: pointers are split into tokens of 64, and at least two are needed."""
MEMORY_CHANNELS = 64
"""Hard-coded in transformers as the input width of the cross-attention."""
STAGE_WIDTHS = (16, 32, 64, 128)
BLOCKS = (1, 1, 2, 1)


def tiny_config(side: int = 128) -> Sam2VideoConfig:
    """Return the configuration for square images of `side` pixels, a multiple of 32."""
    cells = side // 16
    config = Sam2VideoConfig(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": STAGE_WIDTHS[0],
                "image_size": [side, side],
                "num_attention_heads": 1,
                "blocks_per_stage": list(BLOCKS),
                "embed_dim_per_stage": list(STAGE_WIDTHS),
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "window_size_per_stage": [8, 4, 8, 4],
                "global_attention_blocks": [sum(BLOCKS) - 2],
                "window_positional_embedding_background_size": [4, 4],
            },
            "backbone_channel_list": list(STAGE_WIDTHS)[::-1],
            "backbone_feature_sizes": [[side // 4] * 2, [side // 8] * 2, [cells] * 2],
            "fpn_hidden_size": HIDDEN,
        },
        prompt_encoder_config={"hidden_size": HIDDEN, "image_size": side, "patch_size": 16},
        image_size=side,
        num_maskmem=4,
        max_object_pointers_in_encoder=4,
        memory_attention_hidden_size=HIDDEN,
        memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=4 * HIDDEN,
        memory_attention_rope_feat_sizes=[cells, cells],
        memory_attention_dropout=0.0,
        memory_attention_rope_dropout=0.0,
        memory_encoder_hidden_size=HIDDEN,
        memory_encoder_output_channels=MEMORY_CHANNELS,
        mask_downsampler_embed_dim=HIDDEN,
        memory_fuser_embed_dim=HIDDEN,
        memory_fuser_intermediate_dim=4 * HIDDEN,
        memory_fuser_layer_scale_init_value=0.1,
        multimask_output_in_sam=False,
        multimask_output_for_tracking=False,
    )
    # not a dict: transformers 5.9 turns a dict into a prompt encoder's configuration
    config.mask_decoder_config = Sam2VideoMaskDecoderConfig(
        hidden_size=HIDDEN,
        mlp_dim=4 * HIDDEN,
        num_attention_heads=4,
        iou_head_hidden_dim=HIDDEN,
        num_multimask_outputs=3,
        dynamic_multimask_via_stability=False,
    )
    return config


def build_tiny_sam2(side: int = 128, seed: int = 0) -> Sam2VideoModel:
    """Return a new float32 model on the CPU; the same `seed` gives the same weights.

    With transformers' initialization, which is meant for fine-tuning, training does not leave a
    plateau of "no mask anywhere" within thousands of steps. This one differs in three places;
    `_match_positions` matters most.
    """
    torch.manual_seed(seed)
    model = Sam2VideoModel(tiny_config(side))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif type(module).__name__ == "Sam2VideoMemoryFuserCXBlock":
            nn.init.constant_(module.get_parameter("scale"), 0.1)
    nn.init.normal_(model.memory_temporal_positional_encoding, std=0.02)
    # one positional matrix under two names in the released model; transformers does not tie them
    image: Any = model.shared_image_embedding
    prompts: Any = model.prompt_encoder.shared_embedding
    prompts.positional_embedding.data.copy_(image.positional_embedding.data)
    _match_positions(model)
    return model


def _match_positions(model: Sam2VideoModel) -> None:
    """Make key and query projections equal where prompts attend to pixels.

    Equal positions then attend to each other from the first step, so that a prompt finds its place
    in the image.
    """
    for name, module in model.mask_decoder.named_modules():
        if type(module).__name__ == "Sam2VideoAttention" and ("cross" in name or "final" in name):
            nn.init.orthogonal_(module.q_proj.weight, gain=1.5)
            module.k_proj.weight.data.copy_(module.q_proj.weight.data)
            nn.init.zeros_(module.q_proj.bias)
            nn.init.zeros_(module.k_proj.bias)


def save_half(weights: dict[str, torch.Tensor], side: int, folder: Path) -> None:
    """Save a state dict as float16 safetensors, in a Sam2Video folder of transformers.

    Args:
        folder: The folder to create; load it with dtype=torch.float32.
    """
    model = Sam2VideoModel(tiny_config(side))
    model.load_state_dict(weights)
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # save_pretrained lets only the owner read it
