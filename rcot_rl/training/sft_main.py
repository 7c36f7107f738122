"""The processes of CoT-SFT: `torchrun … -m rcot_rl.training.sft_main CONFIG.yaml`.

CONFIG.yaml is verl's complete SFT configuration, as `verl_config.sft_config` resolved it. What
follows is verl's own entry point (verl/trainer/sft_trainer.py, `run_sft`) with our checkpoints:
sealed, found by `latest`, pruned after the next one is whole, also those of earlier attempts, and
not begun on a disk that cannot hold them. verl's SFT trainer has no callback for it, remembers what
to delete in memory alone, and deletes before it saves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from rcot_rl.training.checkpoint_store import MANIFEST, make_room, step_of
from rcot_rl.training.checkpoints import finish


class Trainer(SFTTrainer):
    """verl's SFT trainer, one on each rank."""

    def _build_dataloader(self) -> None:
        super()._build_dataloader()
        self.train_sampler.seed = (
            self.config.trainer.seed
        )  # verl's order of rows is always seed 0's

    def _build_ckpt_handler(self) -> None:
        super()._build_ckpt_handler()
        handler, keep = self.ckpt_handler, self.config.trainer.max_ckpt_to_keep
        handler.max_ckpt_to_keep = None  # verl would delete before it saves
        made_of = OmegaConf.to_container(self.config.trainer.rcot.provenance)
        folder = Path(handler.default_local_dir)
        handler.save_checkpoint = saver(handler.save_checkpoint, folder, made_of, keep)
        handler._load_dataloader_state = position_loader(
            handler._load_dataloader_state, len(self.train_dataloader)
        )


def saver(
    save: Callable[[int], None], folder: Path, made_of: Any, keep: int | None
) -> Callable[[int], None]:
    """`save` on every rank, between what only the first does: room before it, the seal after it.

    made_of: the stage's provenance. Of the folder's whole checkpoints, the newest `keep` are kept.
    """

    def save_checkpoint(step: int) -> None:
        checkpoint, first = folder / f"global_step_{step}", dist.get_rank() == 0
        if first:
            (checkpoint / MANIFEST).unlink(missing_ok=True)
            make_room(folder, keep)
        save(step)  # ends with a barrier: all ranks have written
        if first:
            finish(checkpoint, made_of, keep)

    return save_checkpoint


def position_loader(load: Callable[[str], None], steps_per_epoch: int) -> Callable[[str], None]:
    """Wrap verl's `load` of a checkpoint's position in the data so that no epoch is skipped.

    At the end of an epoch, verl saves an iterator that has no rows left. Loaded again, it makes the
    next epoch empty. The next epoch starts with a new iterator instead, as in a run that was not
    interrupted.

    Args:
        load: verl's function of a checkpoint's path.
        steps_per_epoch: Optimizer steps in one epoch.
    """

    def load_position(checkpoint: str) -> None:
        if step_of(Path(checkpoint)) % steps_per_epoch:
            load(checkpoint)

    return load_position


def main(path: str) -> None:
    """Train to the last step, resuming from the newest checkpoint."""
    initialize_global_process_group()
    Trainer(config=OmegaConf.load(path)).fit()
    destroy_global_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
