"""Where one GRPO stage ends, the next begins: `python -m …handoff PREVIOUS OUT LR DECAY BETAS`.

verl builds policy and reference from one folder. The reference of both GRPO stages is CoT-SFT's
model (eq. 15), but the policy of the second starts from the first's. So verl is given the SFT
folder, and step 0 of the new stage is a checkpoint made here: the previous stage's weights, an
optimizer without moments, a scheduler at its start.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rcot_rl.errors import InputError
from rcot_rl.files import link_or_copy
from rcot_rl.training.checkpoint_store import TRACKER, seal


def start_from(
    previous: Path,
    checkpoints: Path,
    lr: float,
    weight_decay: float,
    betas: Sequence[float],
) -> Path:
    """Make `checkpoints`/global_step_0 of the checkpoint `previous`; its pointer is written last.

    Raises InputError when `previous` is not a whole checkpoint.
    """
    source = previous / "actor"
    weights = sorted(source.glob("model_world_size_*_rank_*.pt"))
    if not weights:
        raise InputError("is no checkpoint (no model shards)", file=previous)
    target = checkpoints / "global_step_0"
    partial = checkpoints / ".global_step_0.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    (partial / "actor").mkdir(parents=True)
    for file in [*weights, *source.glob("*_config.json"), *source.glob("lora_train_meta.json")]:
        link_or_copy(file, partial / "actor" / file.name)
    for kind in ("optim", "extra_state"):
        for file in sorted(source.glob(f"{kind}_*.pt")):
            _rewrite(file, partial / "actor" / file.name, lr, weight_decay, betas)
    partial.rename(target)
    seal(target, starts_from=str(previous))
    tracker = checkpoints / f".{TRACKER}"
    tracker.write_text("0", encoding="ascii")
    tracker.replace(checkpoints / TRACKER)
    return target


def _rewrite(
    source: Path, target: Path, lr: float, weight_decay: float, betas: Sequence[float]
) -> None:
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


if __name__ == "__main__":
    start_from(
        Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]),
        json.loads(sys.argv[5]),
    )  # fmt: skip
