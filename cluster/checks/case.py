"""What the preflight's checks look at: a recipe, its run's folder, this host, the base policy.

Numbers of the host are gathered once, in `host_facts`, so that another host's can be put in their
place. Imports no torch: a GPU's memory is asked of `nvidia-smi`, where there is one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil

from cluster.checks.policy_facts import PolicyFacts, policy_facts
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
    ram_bytes: int
    """Of the machine, or of this process' control group, if that is less."""
    available_bytes: int
    """Of RAM, now."""
    disk_free_bytes: int
    """Where the run's folder is, or will be."""
    shm_bytes: int | None
    """Size of /dev/shm; None where there is none."""
    gpu_gib: float | None
    """Memory of the smallest GPU; None: none seen."""
    gpus: int | None
    """How many nvidia-smi lists; None: it is not here."""


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
    memory = psutil.virtual_memory()
    gpus = _gpus() if look_for_gpu else None
    shm = Path("/dev/shm")
    return HostFacts(
        cpus=len(os.sched_getaffinity(0)),
        ram_bytes=min(memory.total, _group_limit() or memory.total),
        available_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(existing(root)).free,
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        gpu_gib=min(gpus) if gpus else None,
        gpus=None if gpus is None else len(gpus),
    )


def existing(path: Path) -> Path:
    """The path, or its nearest parent that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _group_limit() -> int | None:
    """Bytes that the control group may have (version 2, or 1); None: no limit found."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(name).read_text())
        except (OSError, ValueError):
            continue  # not this version, or "max"
    return None


def _gpus() -> list[float] | None:
    """GiB of every GPU that nvidia-smi lists; None when it is not here, or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
        return [float(line) / 1024 for line in done.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
