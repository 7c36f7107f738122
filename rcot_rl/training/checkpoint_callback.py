"""After each save: seal the checkpoint, point `latest` to it, prune older ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from rcot_rl.training.checkpoint_store import point_latest, prune
from rcot_rl.training.jobs import KEEP
from rcot_rl.training.provenance import seal_with_provenance


class SaveCallback(CheckpointCallback):
    """`trainer.checkpoint_callback_class` of GRPO; called on the driver after a save."""

    def on_save(
        self,
        trainer: Any,
        global_step: int,
        checkpoint_dir: str,
        async_save: bool = False,
        **_: Any,
    ) -> None:
        """Finish the checkpoint in `checkpoint_dir`, unless it is still being written."""
        if async_save:
            return
        settings = trainer.config.trainer.rcot
        finish(
            Path(checkpoint_dir), OmegaConf.to_container(settings.provenance), settings.get(KEEP)
        )


def finish(checkpoint: Path, facts: Any, keep: int | None) -> None:
    """Make a checkpoint count once all its files are written; only then delete old ones.

    Args:
        checkpoint: Its folder (global_step_N).
        facts: The stage's provenance, as JSON values.
        keep: Number of complete checkpoints to keep; None keeps all.
    """
    seal_with_provenance(checkpoint, facts)
    point_latest(checkpoint)
    if keep is not None:
        prune(checkpoint.parent, keep)
