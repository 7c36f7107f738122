"""A recipe small enough for a test: the laptop's, with a handful of rows and two steps a stage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    "toy.corpora=[{layout: mevis, split: train, videos: 60}, "
    "{layout: mevis, split: valid_u, videos: 3}]",
    "data.corpora=[{dataset: mevis}]",
    "data.sets={sft-1536: {ktg: 64, aks: 64, val: 8}, grpo-aks-640: {aks: 32, val: 8}, "
    "grpo-ktg-960: {ktg: 32, val: 8}}",
    "sft.epochs=1",
    "sft.batch_size=16",
    "sft.micro_batch_size=16",
    "sft.save_every=2",
    "grpo.prompts_per_step=4",
    "grpo.micro_batch_size=32",
    "grpo.save_every=1",
    "grpo.keep_checkpoints=4",  # step 0, from which a stage starts, is looked at
    "grpo_aks.steps=3",
    "grpo_ktg.steps=2",
    "eval.benchmarks=[{dataset: mevis, split: valid_u, limit: 3}]",
    "eval.heldout_prompts=4",
    "eval.heldout_samples=2",
]


@pytest.fixture(scope="session")
def small() -> list[str]:
    return SMALL


@pytest.fixture(scope="session")
def rcot():
    """Start the console script; `mark` goes into the environment of all that it starts."""

    def start(*arguments: str, mark: str = "unmarked", **options) -> subprocess.Popen:
        return subprocess.Popen(
            [str(Path(sys.executable).parent / "rcot"), *arguments],
            env=os.environ | {"RCOT_TEST_MARK": mark},
            text=True,
            **options,
        )

    return start


@pytest.fixture(scope="session")
def survivors():
    """Command lines of processes whose environment has the mark."""

    def find(mark: str) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if f"RCOT_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found.append(line.decode(errors="replace"))
            except OSError:
                continue
        return [line for line in found if line]

    return find
