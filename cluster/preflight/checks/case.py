"""What the preflight's checks look at: a recipe, its run's folder, this host, the base policy.

Numbers of the host are gathered once, in `host_facts`, so that another host's can be put in their
place. Imports no torch: `rcot_rl.machine` reads them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cluster.preflight.checks.policy_facts import PolicyFacts, policy_facts
from rcot_rl import machine
from rcot_rl.recipe.schema import STAGES, Recipe
from rcot_rl.runfolder import RunFolder

GRPO = ("grpo-aks", "grpo-ktg")
TRAINING = ("sft", *GRPO)
GIB = 2**30
PAPER_GPU_GIB = 48.0
"""A GPU's memory where none is known: the paper's (A.2)."""


@dataclass(frozen=True)
class HostFacts:
    """Numbers of one host."""

    cpus: int
    """That this process may use: fewer than the machine has under an affinity or a quota."""
    ram_bytes: int
    """Of the machine, or of this process' control groups, if that is less."""
    available_bytes: int
    """Of that RAM, now."""
    disk_free_bytes: int
    """Where the run's folder is, or will be."""
    shm_bytes: int | None
    """Size of /dev/shm; None where there is none."""
    gpu_gib: float | None
    """Memory of the smallest visible GPU or MIG device; None: none seen."""
    gpus: int | None
    """How many of those that nvidia-smi lists are visible; None: it is not here."""


@dataclass(frozen=True)
class Case:
    """One run, before it starts."""

    recipe: Recipe
    root: Path
    """RUN, which need not exist."""
    host: HostFacts
    asked_gpu_gib: float | None = None
    """`--gpu-gib`."""
    stages: tuple[str, ...] | None = None
    """What the command runs; None: the recipe's stages."""
    elsewhere: bool = False
    """The run will be on other hosts, where its files are."""

    @property
    def chosen(self) -> tuple[str, ...]:
        """The stages that the command runs."""
        return self.stages or tuple(self.recipe.stages)

    @cached_property
    def todo(self) -> tuple[str, ...]:
        """Those of them that are not done in the folder, in order."""
        return tuple(s for s in STAGES if s in self.chosen and not self.is_done(s))

    @cached_property
    def policy(self) -> PolicyFacts:
        """The base policy."""
        return policy_facts(self.recipe.models.policy)

    @property
    def grpo(self) -> tuple[str, ...]:
        """The GRPO stages that are still to be run."""
        return tuple(s for s in GRPO if s in self.todo)

    @property
    def training(self) -> tuple[str, ...]:
        """The training stages that are still to be run."""
        return tuple(s for s in TRAINING if s in self.todo)

    @property
    def ranks(self) -> int:
        """Of a training stage, on all nodes."""
        return self.recipe.cluster.nodes * self.recipe.cluster.gpus_per_node

    def is_done(self, stage: str) -> bool:
        """Whether a stage was finished in this folder."""
        return RunFolder(self.root).is_done(stage)

    def shards(self, name: str) -> Path:
        """The folder of a shard set."""
        return self.root / "shards" / name

    @property
    def gpu_is_known(self) -> bool:
        """Return False if a GPU's memory is assumed to be the paper's."""
        return self.asked_gpu_gib is not None or self.host.gpu_gib is not None

    @property
    def gpu(self) -> tuple[float, str]:
        """GiB of a GPU, and how they are known."""
        if self.asked_gpu_gib is not None:
            return self.asked_gpu_gib, "--gpu-gib"
        if self.host.gpu_gib is not None:
            return self.host.gpu_gib, "nvidia-smi on this host"
        return PAPER_GPU_GIB, "the paper's; none seen here, --gpu-gib says otherwise"


def host_facts(root: Path, look_for_gpu: bool) -> HostFacts:
    """This host's. root: the run's folder, or where it will be."""
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
    """The path, or its nearest parent that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())
