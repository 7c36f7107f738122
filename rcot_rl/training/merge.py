"""CoT-SFT's adapter merged into the base: `python -m rcot_rl.training.merge BASE CKPT OUT`.

verl saves each rank's shard of the whole PEFT-wrapped state. The shards are put together, the
adapter's tensors loaded into a PEFT model over BASE, merged, and written with BASE's tokenizer,
chat template and processor, which later stages must share. The hand-off is checked: the merged
model's log-probabilities equal the adapter's.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForImageTextToText

from rcot_rl.errors import InputError

TOLERANCE = 2e-3
"""Largest difference of a log-probability between adapter and merged model (bfloat16 weights)."""

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


def merge(base: Path, checkpoint: Path, out: Path) -> float:
    """Write the merged model to `out`, whole or not at all; returns the largest log-prob gap."""
    meta = json.loads((checkpoint / "lora_train_meta.json").read_text(encoding="utf-8"))
    adapter = _adapter_state(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in adapter})
    targets = [name.removeprefix("base_model.model.") for name in targets]
    config = LoraConfig(r=meta["r"], lora_alpha=meta["lora_alpha"], target_modules=targets)
    wrapped = get_peft_model(model, config)
    result = set_peft_model_state_dict(wrapped, adapter)
    if result.unexpected_keys:
        raise InputError(f"unknown adapter tensor {result.unexpected_keys[0]}", file=checkpoint)
    gap = _merge_and_compare(wrapped, out, base)
    return gap


def _merge_and_compare(wrapped: PeftModel, out: Path, base: Path) -> float:
    probe = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    wrapped.eval()
    with torch.no_grad():
        before = wrapped(input_ids=probe).logits.float().log_softmax(-1)
        merged = wrapped.merge_and_unload()
        after = merged(input_ids=probe).logits.float().log_softmax(-1)
    gap = float((before - after).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(before.abs().max())):
        raise RuntimeError(f"merged log-probabilities differ from the adapter's by {gap:.3g}")
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    merged.save_pretrained(temporary)
    for pattern in _BASE_FILES:
        for file in base.glob(pattern):
            shutil.copy2(file, temporary / file.name)
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)
    return gap


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
    paths = [Path(argument) for argument in sys.argv[1:4]]
    print(f"largest log-probability gap: {merge(*paths):.3g}")
