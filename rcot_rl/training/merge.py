"""CoT-SFT's adapter merged into the base: `python -m rcot_rl.training.merge BASE CKPT OUT`.

verl saves each rank's shard of the whole PEFT-wrapped state. The shards are put together, the
adapter's tensors loaded into a PEFT model over BASE, merged, and written with BASE's tokenizer,
chat template and processor, which later stages must share.

Merged in float32, whatever BASE's type, and the hand-off is checked there: the merged model's
log-probabilities equal the adapter's, to rounding. Checked in bfloat16, logits of 16 and more are
known to an eighth, which hides an error as large, or makes one up. What BASE's own type then costs,
in which the weights are written, is told and is not an error.
"""

from __future__ import annotations

import json
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
from rcot_rl.files import replace_folder

TOLERANCE = 1e-4
"""Largest difference of a log-probability between adapter and merged model, both in float32, as a
share of the largest log-probability's size: a sum in another order, through all layers."""

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
class Gaps:
    """Largest differences between log-probabilities of a text with an image."""

    merged: float
    """Of the merged model and the adapter, in float32."""
    rounded: float
    """Of the merged model in float32 and in the type that it is written in."""


def merge(base: Path, checkpoint: Path, out: Path) -> Gaps:
    """Write the merged model to `out`, whole or not at all, in the type of `base`.

    Raises InputError for a checkpoint without an adapter or with another model's, RuntimeError when
    the merged model computes something else than the adapter did.
    """
    meta = json.loads((checkpoint / "lora_train_meta.json").read_text(encoding="utf-8"))
    adapter = _adapter_state(checkpoint)
    dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in adapter})
    targets = [name.removeprefix("base_model.model.") for name in targets]
    config = LoraConfig(r=meta["r"], lora_alpha=meta["lora_alpha"], target_modules=targets)
    wrapped = get_peft_model(model, config)
    result = set_peft_model_state_dict(wrapped, adapter)
    if result.unexpected_keys:
        raise InputError(f"unknown adapter tensor {result.unexpected_keys[0]}", file=checkpoint)
    merged, gaps = _merge_and_compare(wrapped, _probe(base), dtype)
    _write(merged, out, base)
    return gaps


def _probe(base: Path) -> dict[str, torch.Tensor]:
    """A picture of noise and a question about it, as the model takes them."""
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    processor = AutoProcessor.from_pretrained(base)
    content = [{"type": "image"}, {"type": "text", "text": "Where is the red circle? Think first."}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return dict(processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt"))


def _merge_and_compare(
    wrapped: PeftModel, probe: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[Any, Gaps]:
    wrapped.eval()
    before = _log_probs(wrapped, probe)
    merged = wrapped.merge_and_unload()
    after = _log_probs(merged, probe)
    gap = float((before - after).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(before.abs().max())):
        raise RuntimeError(f"merged log-probabilities differ from the adapter's by {gap:.3g}")
    written = merged.to(dtype)
    rounded = float((after - _log_probs(written, probe)).abs().max())
    return written, Gaps(gap, rounded)


def _log_probs(model: Any, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """float32 [B, L, V]."""
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
    """The adapter's tensors, put together from all ranks' shards, under PEFT's names."""
    shards = sorted(
        checkpoint.glob("model_world_size_*_rank_*.pt"),
        key=lambda p: int(p.stem.rsplit("_", 1)[1]),
    )
    if not shards:
        raise InputError("holds no model shard", file=checkpoint)
    # our own training process wrote these a moment ago: they are not foreign pickles
    states = [torch.load(p, map_location="cpu", weights_only=False) for p in shards]
    names = [name for name in states[0] if "lora_" in name]
    if not names:
        raise InputError("holds no adapter", file=checkpoint)
    return {name.replace(".default.", "."): _whole([s[name] for s in states]) for name in names}


def _whole(parts: list[Any]) -> torch.Tensor:
    """One tensor from its shards: DTensors sharded along one dimension, or replicated."""
    first = parts[0]
    if not hasattr(first, "placements"):
        return first
    (placement,) = first.placements
    locals_ = [part.to_local() for part in parts]
    return torch.cat(locals_, dim=placement.dim) if placement.is_shard() else locals_[0]


if __name__ == "__main__":
    found = merge(*(Path(argument) for argument in sys.argv[1:4]))
    print(f"largest gap of a log-probability: {found.merged:.3g}; as written: {found.rounded:.3g}")
