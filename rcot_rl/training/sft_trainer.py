"""verl's SFT trainer with our checkpoints, and with seconds, throughput and host figures per step.

They are sealed, pointed to by `latest`, pruned only after the next one is complete (also those of
earlier attempts), and not started on a disk that cannot hold them. verl's SFT trainer has no
callback for this, remembers what to delete only in memory, and deletes before it saves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils import tensordict_utils
from verl.utils.checkpoint import CheckpointHandler

from rcot_rl.training import verl_patches
from rcot_rl.training.checkpoint_callback import finish
from rcot_rl.training.checkpoint_store import MANIFEST, make_room, step_of
from rcot_rl.training.gpu_sampler import GpuSampler
from rcot_rl.training.host_metrics import memory_metrics, read
from rcot_rl.training.storage_metrics import storage_metrics

logger = logging.getLogger(__name__)


class SealingCheckpointHandler(CheckpointHandler):
    """verl's handler; rank 0 also makes room before a save, and seals and prunes after it."""

    provenance: Any = None
    """The stage's provenance, as JSON values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # verl would delete before it saves
        self.keep, self.max_ckpt_to_keep = self.max_ckpt_to_keep, None

    def save_checkpoint(self, step: int) -> None:
        """Save the checkpoint of `step`; on every rank. Raises InputError."""
        folder = Path(self.default_local_dir)
        checkpoint = folder / f"global_step_{step}"
        if self.rank == 0:
            (checkpoint / MANIFEST).unlink(missing_ok=True)
            make_room(folder, self.keep)
        super().save_checkpoint(step)  # ends with a barrier: all ranks have written
        if self.rank == 0:
            finish(checkpoint, self.provenance, self.keep)

    def _load_dataloader_state(self, checkpoint_path: str) -> None:
        """Load the position in the data, unless the checkpoint ends an epoch.

        At the end of an epoch, verl saves an iterator without rows. If it were loaded, the next
        epoch would be empty. The next epoch starts with a new iterator instead, as in a run that
        was not interrupted.
        """
        if step_of(Path(checkpoint_path)) % len(self.train_dataloader):
            super()._load_dataloader_state(checkpoint_path)


class RCoTSFTTrainer(SFTTrainer):
    """verl's SFT trainer, one per rank."""

    ckpt_handler: SealingCheckpointHandler

    def fit(self) -> None:
        """Train to the last step; the first rank adds metrics of the system to each step's."""
        if self.rank != 0:
            super().fit()
            return
        client = self.training_client
        with GpuSampler() as gpus:
            verl_patches.replace(client, "train_batch", self._measured(client.train_batch, gpus))
            super().fit()

    def _measured(self, train_batch: Callable[..., Any], gpus: GpuSampler) -> Callable[..., Any]:
        """Return `train_batch` with a step's seconds, throughput and host figures in its output.

        verl logs right after `train_batch`, so a step's seconds start at the end of the step
        before: its checkpoint and the loading of this step's rows are included.
        """
        checkpoints = Path(self.config.trainer.default_local_dir)
        ended: float | None = None

        def measured(data: Any) -> Any:
            nonlocal ended
            started = time.monotonic()
            output = train_batch(data=data)
            update_s = time.monotonic() - started
            step_s = time.monotonic() - (started if ended is None else ended)
            tokens = sum(tensordict_utils.get(data, "global_token_num"))
            metrics = dict(tensordict_utils.get(output, "metrics"))
            metrics |= {"timing_s/update": update_s, "timing_s/step": step_s}
            metrics["perf/throughput"] = tokens / step_s / self.engine.get_data_parallel_size()
            metrics |= memory_metrics({"host0": read([])}, {})
            metrics |= {f"gpu/host0/{name}": value for name, value in gpus.take().items()}
            metrics |= storage_metrics(checkpoints)
            tensordict_utils.assign_non_tensor(output, metrics=metrics)
            ended = time.monotonic()
            return output

        return measured

    def _build_dataloader(self) -> None:
        super()._build_dataloader()
        # without this, verl's row order always uses seed 0
        self.train_sampler.seed = self.config.trainer.seed

    def _build_ckpt_handler(self) -> None:
        with verl_patches.checkpoint_handler(SealingCheckpointHandler):
            super()._build_ckpt_handler()
        handler = self.ckpt_handler
        handler.provenance = OmegaConf.to_container(self.config.trainer.rcot.provenance)
        logger.info(
            "CoT-SFT: %d steps per epoch, seed %d, checkpoints in %s, newest %s kept",
            len(self.train_dataloader),
            self.config.trainer.seed,
            handler.default_local_dir,
            handler.keep,
        )
