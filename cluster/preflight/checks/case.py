"""What the preflight's checks read: a recipe, its run folder, this host, the base policy.

`host_facts` collects the numbers of this host; those of another one can take their place. Imports
no torch.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.preflight.checks.policy_facts import PolicyFacts, policy_facts
from rcot_rl.recipe.schema import Recipe
from rcot_rl.runfolder import RunFolder
from rcot_rl.system import machine

GIB = 2**30
MANIFEST = "manifest.json"
"""data_pipelines/manifest.py, whose import takes half a second."""

PAPER_GPU_GIB = 48.0
"""Memory of a GPU if unknown: the paper's (A.2)."""


@dataclass(frozen=True)
class HostFacts:
    """Sizes of one host."""

    cpus: int
    """CPUs that this process may use: its affinity and quota may allow fewer than the host has."""
    ram_bytes: int
    """RAM of the host, or the limit of this process' control groups if that is less."""
    available_bytes: int
    """Part of that RAM that is available now."""
    disk_free_bytes: int
    """Free space for the run folder."""
    shm_bytes: int | None
    """Size of /dev/shm; None if there is none."""
    gpu_gib: float | None
    """Memory of the smallest visible GPU or MIG device; None if none is visible."""
    gpus: int | None
    """Number of visible GPUs; None if nvidia-smi is missing."""


@dataclass(frozen=True)
class RunCase:
    """One run, before it starts."""

    recipe: Recipe
    root: Path
    """The run folder, which need not exist."""
    host: HostFacts
    asked_gpu_gib: float | None = None
    """`--gpu-gib`."""
    stages: tuple[str, ...] | None = None
    """Stages that the command runs. None: the recipe's."""
    elsewhere: bool = False
    """Whether the run will be on other hosts, with files that this one does not see."""

    @property
    def chosen(self) -> tuple[str, ...]:
        """The stages that the command runs, in order."""
        return self.recipe.in_order(self.stages or self.recipe.stages)

    @cached_property
    def todo(self) -> tuple[str, ...]:
        """The chosen stages that are not done in the folder, in order."""
        return tuple(s for s in self.chosen if not self.is_done(s))

    @cached_property
    def policy(self) -> PolicyFacts:
        """The base policy."""
        return policy_facts(self.recipe.models.policy)

    @property
    def sft(self) -> tuple[str, ...]:
        """The SFT stages that are still to be run."""
        return tuple(s for s in self.todo if s in self.recipe.sft_stages)

    @property
    def grpo(self) -> tuple[str, ...]:
        """The GRPO stages that are still to be run."""
        return tuple(s for s in self.todo if s in self.recipe.grpo_stages)

    @property
    def training(self) -> tuple[str, ...]:
        """The training stages that are still to be run."""
        return tuple(s for s in self.todo if s in self.recipe.train)

    @property
    def ranks(self) -> int:
        """Number of ranks of a GRPO stage, on all nodes."""
        return self.recipe.cluster.nodes * self.recipe.cluster.gpus_per_node

    def is_done(self, stage: str) -> bool:
        """Return True if a stage is done in this folder."""
        return RunFolder(self.root).is_done(stage)

    def is_begun(self, stage: str) -> bool:
        """Return True if a training stage has a checkpoint in this folder."""
        return any(self.root.glob(f"{stage}/checkpoints/global_step_*"))

    def shards(self, name: str) -> Path:
        """Return the folder of a shard set."""
        return self.root / "shards" / name

    def manifest(self, name: str) -> Any:
        """Return the manifest of a shard set, as it is; None if it is missing or unreadable."""
        try:
            return json.loads((self.shards(name) / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    @property
    def gpu_is_known(self) -> bool:
        """Return False if a GPU's memory is assumed to be the paper's."""
        return self.asked_gpu_gib is not None or self.host.gpu_gib is not None

    @property
    def gpu(self) -> tuple[float, str]:
        """Memory of a GPU in GiB, and where the number is from."""
        if self.asked_gpu_gib is not None:
            return self.asked_gpu_gib, "--gpu-gib"
        if self.host.gpu_gib is not None:
            return self.host.gpu_gib, "nvidia-smi on this host"
        return PAPER_GPU_GIB, "the paper's; none seen here, --gpu-gib says otherwise"


def host_facts(root: Path, look_for_gpu: bool) -> HostFacts:
    """Return the sizes of this host.

    Args:
        root: The run folder, which need not exist.
    """
    memory = machine.memory()
    gpus = machine.gpu_memories() if look_for_gpu else None
    known = [gib for gib in gpus or [] if gib is not None]
    shm = Path("/dev/shm")
    return HostFacts(
        cpus=machine.cpus(),
        ram_bytes=memory.total,
        available_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(existing(root)).free,
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        gpu_gib=min(known, default=None),
        gpus=None if gpus is None else len(gpus),
    )


def existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())
