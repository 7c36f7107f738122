"""Start a GRPO stage from the previous one's policy, as a checkpoint at step 0.

    python -m rcot_rl.training.stage_start PREVIOUS CHECKPOINTS LR WEIGHT_DECAY BETAS

verl builds policy and reference from one folder. The reference of both GRPO stages is CoT-SFT's
model (eq. 15), but the second stage's policy starts from the first stage's. So verl is given the
SFT folder, and resumes from a step 0 that is written here: the previous stage's weights, an
optimizer without moments, and a scheduler at its start.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rcot_rl.errors import InputError
from rcot_rl.events import child_process
from rcot_rl.system.files import link_or_copy
from rcot_rl.training.checkpoint_store import TRACKER, seal


def start_from(
    previous: Path,
    checkpoints: Path,
    lr: float,
    weight_decay: float,
    betas: Sequence[float],
) -> Path:
    """Write `checkpoints`/global_step_0 from `previous`; verl's pointer comes last. InputError."""
    source = previous / "actor"
    weights = sorted(source.glob("model_world_size_*_rank_*.pt"))
    if not weights:
        raise InputError("is not a checkpoint (no model shards)", file=previous)
    target = checkpoints / "global_step_0"
    partial = checkpoints / ".global_step_0.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    (partial / "actor").mkdir(parents=True)
    for file in [*weights, *source.glob("*_config.json"), *source.glob("lora_train_meta.json")]:
        link_or_copy(file, partial / "actor" / file.name)
    for kind in ("optim", "extra_state"):
        for file in sorted(source.glob(f"{kind}_*.pt")):
            _reset(file, partial / "actor" / file.name, lr, weight_decay, betas)
    partial.rename(target)
    seal(target, starts_from=str(previous))
    tracker = checkpoints / f".{TRACKER}"
    tracker.write_text("0", encoding="ascii")
    tracker.replace(checkpoints / TRACKER)
    return target


def _reset(
    source: Path, target: Path, lr: float, weight_decay: float, betas: Sequence[float]
) -> None:
    """Write the optimizer or scheduler state `source` to `target`, reset to before any step."""
    # written by our own training process: not a foreign pickle
    state = torch.load(source, map_location="cpu", weights_only=False)
    if "param_groups" in state:
        state["state"] = {}
        for group in state["param_groups"]:
            group.update(lr=lr, initial_lr=lr, weight_decay=weight_decay, betas=tuple(betas))
    scheduler = state.get("lr_scheduler")
    if scheduler:
        rates = [lr] * len(scheduler["base_lrs"])
        scheduler.update(base_lrs=rates, _last_lr=list(rates), last_epoch=0, _step_count=1)
    torch.save(state, target)


def main(arguments: list[str]) -> None:
    """Parse PREVIOUS CHECKPOINTS LR WEIGHT_DECAY BETAS (a JSON list) and write step 0."""
    previous, checkpoints, lr, weight_decay, betas = arguments
    start_from(Path(previous), Path(checkpoints), float(lr), float(weight_decay), json.loads(betas))


if __name__ == "__main__":
    with child_process():
        main(sys.argv[1:])
