"""verl's checkpoint callback: an atomically replaced `latest` beside the checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback


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
        if not async_save:
            point_latest(Path(checkpoint_dir))


def point_latest(checkpoint: Path) -> None:
    """Make `latest`, a relative link beside `checkpoint`, name it; readers see old or new."""
    temporary = checkpoint.parent / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    temporary.replace(checkpoint.parent / "latest")
