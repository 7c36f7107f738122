"""verl's checkpoint callback: each checkpoint's provenance, and an atomically replaced `latest`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from rcot_rl.files import write_text
from rcot_rl.training.provenance import FILE


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
        checkpoint = Path(checkpoint_dir)
        made_of = OmegaConf.to_container(trainer.config.trainer.rcot)
        write_text(checkpoint / FILE, json.dumps(made_of, indent=1) + "\n")
        point_latest(checkpoint)


def point_latest(checkpoint: Path) -> None:
    """Make `latest`, a relative link beside `checkpoint`, name it; readers see old or new."""
    temporary = checkpoint.parent / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    temporary.replace(checkpoint.parent / "latest")
