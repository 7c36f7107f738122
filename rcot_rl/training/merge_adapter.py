"""Merge CoT-SFT's adapter: `python -m rcot_rl.training.merge_adapter BASE CHECKPOINT OUT`.

verl saves each rank's shard of the whole PEFT-wrapped state. The shards are joined, the adapter's
tensors are loaded into a PEFT model over BASE, merged, and written with BASE's tokenizer, chat
template and processor, which later stages must share.

The merge runs in float32, whatever BASE's dtype, and is verified there: the merged model's
log-probabilities equal the adapter's, up to rounding. In bfloat16, logits of 16 and more have a
resolution of 1/8, which would hide an error of that size or suggest one. The rounding to BASE's
dtype, in which the weights are written, is reported, not raised.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from rcot_rl.errors import InputError
from rcot_rl.events import child_process
from rcot_rl.system.files import replace_folder

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest allowed difference between adapter and merged log-probabilities, both in float32.

Relative to the largest log-probability. It covers sums in another order, through all layers."""

_BASE_FILES = (
    "*.jinja",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*processor_config.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class MergeGaps:
    """Largest differences between log-probabilities of a text with an image."""

    merged: float
    """Between the merged model and the adapter, in float32."""
    rounded: float
    """Between the merged model in float32 and in the dtype it is written in."""


def merge(base: Path, checkpoint: Path, out: Path) -> MergeGaps:
    """Write the merged model to `out`, atomically, in the dtype of `base`.

    Raises:
        InputError: The checkpoint has no adapter, or another model's.
        RuntimeError: The merged model does not reproduce the adapter's log-probabilities.
    """
    meta = json.loads((checkpoint / "lora_train_meta.json").read_text(encoding="utf-8"))
    adapter = _adapter_state(checkpoint)
    dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in adapter})
    targets = [name.removeprefix("base_model.model.") for name in targets]
    config = LoraConfig(r=meta["r"], lora_alpha=meta["lora_alpha"], target_modules=targets)
    logger.info(
        "merging an adapter of rank %d, alpha %d, %d modules into %s; writing %s",
        meta["r"],
        meta["lora_alpha"],
        len(targets),
        base,
        dtype,
    )
    wrapped = get_peft_model(model, config)
    result: Any = set_peft_model_state_dict(wrapped, adapter)
    if result.unexpected_keys:
        raise InputError(f"unknown adapter tensor {result.unexpected_keys[0]}", file=checkpoint)
    merged, gaps = _merge_and_compare(wrapped, _probe(base), dtype)
    _write(merged, out, base)
    return gaps


def _probe(base: Path) -> dict[str, torch.Tensor]:
    """Return a noise image and a question about it, as model inputs."""
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    processor = AutoProcessor.from_pretrained(base)
    content = [{"type": "image"}, {"type": "text", "text": "Where is the red circle? Think first."}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return dict(processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt"))


def _merge_and_compare(
    wrapped: PeftModel, probe: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[Any, MergeGaps]:
    """Merge the adapter; return the model in `dtype`, and how it differs from the adapter."""
    wrapped.eval()
    before = _log_probs(wrapped, probe)
    merged: Any = wrapped.merge_and_unload()
    after = _log_probs(merged, probe)
    gap = float((before - after).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(before.abs().max())):
        raise RuntimeError(f"merged log-probabilities differ from the adapter's by {gap:.3g}")
    written = merged.to(dtype)
    rounded = float((after - _log_probs(written, probe)).abs().max())
    return written, MergeGaps(gap, rounded)


def _log_probs(model: Any, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the model's log-probabilities, float32 [B, L, V]."""
    with torch.no_grad():
        return model(**probe).logits.float().log_softmax(-1)


def _write(merged: Any, out: Path, base: Path) -> None:
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.save_pretrained(temporary)
    for pattern in _BASE_FILES:
        for file in base.glob(pattern):
            shutil.copy2(file, temporary / file.name)
    replace_folder(temporary, out)


def _adapter_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Join the adapter's tensors from all ranks' shards; keys are PEFT's names."""
    shards = sorted(
        checkpoint.glob("model_world_size_*_rank_*.pt"),
        key=lambda p: int(p.stem.rsplit("_", 1)[1]),
    )
    if not shards:
        raise InputError("has no model shard", file=checkpoint)
    # written by our own training process: not foreign pickles
    states = [torch.load(p, map_location="cpu", weights_only=False) for p in shards]
    names = [name for name in states[0] if "lora_" in name]
    if not names:
        raise InputError("has no adapter", file=checkpoint)
    return {name.replace(".default.", "."): _joined([s[name] for s in states]) for name in names}


def _joined(parts: list[Any]) -> torch.Tensor:
    """Join one tensor's shards: DTensors sharded along one dimension, or replicated."""
    first = parts[0]
    if not hasattr(first, "placements"):
        return first
    (placement,) = first.placements
    shards = [part.to_local() for part in parts]
    return torch.cat(shards, dim=placement.dim) if placement.is_shard() else shards[0]


if __name__ == "__main__":
    with child_process():
        gaps = merge(*(Path(argument) for argument in sys.argv[1:4]))
        print(
            f"largest gap of a log-probability: {gaps.merged:.3g}; as written: {gaps.rounded:.3g}"
        )
