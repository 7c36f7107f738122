"""Floating-point operations of Qwen2.5-VL, from a checkpoint's shapes, and the device's peak."""

from __future__ import annotations

import json
from pathlib import Path

PEAK_FLOPS = 989e12
"""Dense bf16 of an H100 or H200 SXM, from the data sheet."""


def passes(model: Path | str, sequences: int, length: float, patches: int) -> dict[str, float]:
    """Return the operations of one forward pass and of one update over a step's batch.

    Counts what the result needs: two operations per parameter and token for the forward pass, twice
    that for the backward pass, and the two products of attention, without the recomputation of
    gradient checkpointing. Each sequence has its own image.

    Args:
        model: Checkpoint folder, for its shapes.
        sequences: Number of sequences in the batch.
        length: Tokens per sequence, including those of the image.
        patches: Vision patches per image, four per token.

    Returns:
        `text`, `vision` and `forward` (one forward pass), and `update` (forward and backward).
    """
    config = json.loads((Path(model) / "config.json").read_text())
    text, tower = config["text_config"], config["vision_config"]
    h, i, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    kv = h // text["num_attention_heads"] * text["num_key_value_heads"]
    weights = layers * (2 * h * h + 2 * h * kv + 3 * h * i) + h * text["vocab_size"]
    causal = layers * 2 * length * h  # QK' and PV, each 2 L h per token, half of it masked
    in_text = sequences * length * (2 * weights + causal)
    v, m, depth = tower["hidden_size"], tower["intermediate_size"], tower["depth"]
    full = len(tower["fullatt_block_indexes"])
    window = (tower["window_size"] // tower["patch_size"]) ** 2
    attended = full * patches + (depth - full) * min(window, patches)
    merge = tower["spatial_merge_size"] ** 2
    merger = ((merge * v) ** 2 + merge * v * tower["out_hidden_size"]) / merge
    per_patch = 2 * (depth * (4 * v * v + 3 * v * m) + merger) + 4 * v * attended
    in_vision = sequences * patches * per_patch
    forward = in_text + in_vision
    return {"text": in_text, "vision": in_vision, "forward": forward, "update": 3 * forward}
