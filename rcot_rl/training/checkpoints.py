"""Each checkpoint is sealed, found by `latest`, and old ones pruned: verl's callback, and SFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from rcot_rl.training.checkpoint_store import point_latest, prune
from rcot_rl.training.jobs import KEEP
from rcot_rl.training.provenance import seal_made_of


class SaveCallback(CheckpointCallback):
    """`trainer.checkpoint_callback_class`; called on the driver once a checkpoint is whole."""

    def on_save(
        self,
        trainer: Any,
        global_step: int,
        checkpoint_dir: str,
        async_save: bool = False,
        **_: Any,
    ) -> None:
        if async_save:
            return
        ours = trainer.config.trainer.rcot
        finish(Path(checkpoint_dir), OmegaConf.to_container(ours.provenance), ours.get(KEEP))


def finish(checkpoint: Path, made_of: Any, keep: int | None) -> None:
    """Make a checkpoint count whose files are all written; then, and not before, delete old ones.

    made_of: what the stage was made of, as JSON. keep: whole checkpoints to keep; None: all.
    """
    seal_made_of(checkpoint, made_of)
    point_latest(checkpoint)
    if keep is not None:
        prune(checkpoint.parent, keep)
