"""SAM2.1-large's shapes with random weights, propagated through a clip."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import Sam2VideoConfig, Sam2VideoModel

from rcot_rl.segmentation.sam2 import Sam2Segmenter

LARGE = {
    "backbone_config": {
        "hidden_size": 144,
        "num_attention_heads": 2,
        "blocks_per_stage": [2, 6, 36, 4],
        "embed_dim_per_stage": [144, 288, 576, 1152],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "window_size_per_stage": [8, 4, 16, 8],
        "global_attention_blocks": [23, 33, 43],
    },
    "backbone_channel_list": [1152, 576, 288, 144],
}
"""`vision_config` of facebook/sam2.1-hiera-large where it differs from transformers' defaults."""


def build(device: str, dtype: str, *, tiny: bool = False) -> Sam2Segmenter:
    """Return the model with random weights; with `tiny`, in the shapes of the shipped one."""
    torch.manual_seed(0)
    if tiny:
        from rcot_rl.segmentation.segmenter import TINY

        config = Sam2VideoConfig.from_pretrained(TINY)
    else:
        config = Sam2VideoConfig(vision_config=dict(LARGE))
    with torch.device(device):
        model = Sam2VideoModel(config).to(getattr(torch, dtype))
    return Sam2Segmenter(model, f"random SAM2, {dtype}")


def propagate(segmenter: Sam2Segmenter, frames: np.ndarray, objects: int) -> dict[str, Any]:
    """Segment `objects` boxes in a clip, with the prompted frame in the middle for both passes.

    Args:
        segmenter: The segmenter.
        frames: uint8 [T, H, W, 3] RGB.
        objects: Number of objects.

    Returns:
        Seconds, frames per second and peak memory.
    """
    cuda = segmenter.model.device.type == "cuda"
    height, width = frames.shape[1:3]
    left = np.linspace(0.05, 0.6, objects) * width
    boxes = np.stack(
        [left, left * 0 + 0.2 * height, left + 0.3 * width, left * 0 + 0.8 * height], 1
    )
    points = boxes.reshape(-1, 2, 2).mean(1)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    n_frames = 0
    for _, masks in segmenter.segment(frames, len(frames) // 2, boxes, points):
        assert masks.shape == (objects, height, width)
        n_frames += 1
    seconds = time.perf_counter() - started
    assert n_frames == len(frames)
    row: dict[str, Any] = {"seconds": seconds, "frames_per_s": len(frames) / seconds}
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row
