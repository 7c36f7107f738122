"""A SAM2 small enough to train on one CPU core: its configuration and its initialisation.

The architecture is SAM2's own as transformers implements it (Hiera, prompt encoder, mask decoder,
memory attention, memory encoder), with 2.2 million parameters instead of 39 million and upwards.
All weights are independent of the image side, so one set can be trained at 64 px and go on at 128.
What it leaves out: several mask hypotheses per prompt, and mask prompts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import Sam2VideoConfig, Sam2VideoModel
from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoMaskDecoderConfig

HIDDEN = 128  # the smallest that runs: pointers are cut into tokens of 64, and need more than one
MEMORY_CHANNELS = 64  # hard-coded as the cross-attention's input width in transformers
STAGES = (16, 32, 64, 128)
BLOCKS = (1, 1, 2, 1)


def tiny_config(side: int = 128) -> Sam2VideoConfig:
    """The configuration for square images of `side` pixels, a multiple of 32."""
    cells = side // 16
    config = Sam2VideoConfig(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": STAGES[0],
                "image_size": [side, side],
                "num_attention_heads": 1,
                "blocks_per_stage": list(BLOCKS),
                "embed_dim_per_stage": list(STAGES),
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "window_size_per_stage": [8, 4, 8, 4],
                "global_attention_blocks": [sum(BLOCKS) - 2],
                "window_positional_embedding_background_size": [4, 4],
            },
            "backbone_channel_list": list(STAGES)[::-1],
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
    # An object, not a dict: given a dict, transformers 5.9 builds a prompt encoder's configuration.
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
    """A freshly initialised model, float32 on the CPU; the same `seed` gives the same weights.

    transformers' own initialisation of this architecture (meant for fine-tuning) does not leave a
    plateau of "no mask anywhere" within thousands of steps, so this one departs from it in three
    places; `_match_positions` is the one that matters most.
    """
    torch.manual_seed(seed)
    model = Sam2VideoModel(tiny_config(side))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif type(module).__name__ == "Sam2VideoMemoryFuserCXBlock":
            nn.init.constant_(module.scale, 0.1)
    nn.init.normal_(model.memory_temporal_positional_encoding, std=0.02)
    # One positional matrix under two names in the released model; transformers does not tie them.
    tied = model.shared_image_embedding.positional_embedding
    model.prompt_encoder.shared_embedding.positional_embedding.data.copy_(tied.data)
    _match_positions(model)
    return model


def _match_positions(model: Sam2VideoModel) -> None:
    """Ties key to query projections where prompts and pixels meet.

    Equal positions then attend to one another from the first step, which is what a prompt needs to
    find its place in the image.
    """
    for name, module in model.mask_decoder.named_modules():
        if type(module).__name__ == "Sam2VideoAttention" and ("cross" in name or "final" in name):
            nn.init.orthogonal_(module.q_proj.weight, gain=1.5)
            module.k_proj.weight.data.copy_(module.q_proj.weight.data)
            nn.init.zeros_(module.q_proj.bias)
            nn.init.zeros_(module.k_proj.bias)


def save_half(weights: dict[str, torch.Tensor], side: int, folder: Path) -> None:
    """Writes the state dict `weights` of a model for images of `side` px, as float16 safetensors.

    folder: becomes a transformers Sam2Video folder; load it with dtype=torch.float32.
    """
    model = Sam2VideoModel(tiny_config(side))
    model.load_state_dict(weights)
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone; this one ships
