"""verl's checkpoint callback: each checkpoint is sealed, found by `latest`, and old ones pruned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from rcot_rl.files import write_text
from rcot_rl.training.checkpoint_store import point_latest, prune, seal
from rcot_rl.training.jobs import KEEP
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
        ours = trainer.config.trainer.rcot
        made_of, keep = OmegaConf.to_container(ours.provenance), ours.get(KEEP)
        write_text(checkpoint / FILE, json.dumps(made_of, indent=1) + "\n")
        seal(checkpoint, provenance=made_of)
        point_latest(checkpoint)
        if keep is not None:
            # only now that the new one is whole; verl would delete before it saves
            prune(checkpoint.parent, keep)
