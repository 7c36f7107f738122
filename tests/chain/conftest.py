"""A recipe small enough for a test: the laptop's, with a handful of rows and two steps a stage."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rcot_rl.recipe.loader import load_recipe
from rcot_rl.runfolder import RunFolder

SMALL = [
    "toy.corpora=[{layout: mevis, split: train, videos: 60}, "
    "{layout: mevis, split: valid_u, videos: 3}]",
    "data.corpora=[{dataset: mevis}]",
    # grpo-aks: an epoch is one step of 4 prompts and leaves 2 rows over, so every resume is at an
    # epoch boundary
    "data.sets={sft-384: {ktg: 64, aks: 192, val: 8}, grpo-aks-480: {aks: 6, val: 8}, "
    "grpo-ktg-960: {ktg: 32, val: 8}}",
    "train.sft.epochs=2",  # until some answers earn something: equal rewards move no weight
    "train.sft.batch_size=16",
    "train.sft.micro_batch_size=16",
    "train.sft.save_every=2",
    "grpo.prompts_per_step=4",
    "grpo.micro_batch_size=32",
    "grpo.save_every=1",
    "grpo.keep_checkpoints=4",  # step 0, from which a stage starts, is looked at
    "train.grpo-aks.steps=3",
    "train.grpo-ktg.steps=2",
    "eval.benchmarks=[{dataset: mevis, split: valid_u, limit: 3}]",
    "eval.heldout_prompts=4",
    "eval.heldout_samples=2",
]


TRAINED = [
    "toy.corpora=[{layout: mevis, split: train, videos: 60}]",
    "data.corpora=[{dataset: mevis}]",
    "data.describe=template",
    "data.clip_frames=6",
    "data.clip_tasks=[aks]",
    "data.sets={sft-384: {ktg: 64, aks: 256, val: 8}, grpo-aks-480: {aks: 32, val: 8}, "
    "grpo-ktg-960: {ktg: 16, aks: 16, val: 8}}",
    "train.grpo-ktg.rehearse=null",  # its own set has AKS rows
    "train.sft.batch_size=16",
    "train.sft.micro_batch_size=16",
    "train.sft.epochs=2",
    "grpo.prompts_per_step=4",
    "grpo.micro_batch_size=32",
    "grpo.max_prompt_length=256",
    "eval.benchmarks=[]",
    "wandb.mode=disabled",  # test_tracking.py and runs of SMALL are tracked
]


@pytest.fixture(scope="session")
def small() -> list[str]:
    return SMALL


@pytest.fixture(scope="session")
def start_rcot():
    """Return a function that starts the console script.

    `mark` is in the environment of every process that it starts.
    """

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
    """Return a function that lists the command lines of processes with a mark."""

    def find(mark: str) -> list[str]:
        commands = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if f"RCOT_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    commands.append(line.decode(errors="replace"))
            except OSError:
                continue
        return [line for line in commands if line]

    return find


@pytest.fixture(scope="session")
def trained(tmp_path_factory, start_rcot):
    """Return a run with shards and an SFT model, to branch from."""
    run = tmp_path_factory.mktemp("trained") / "run"
    words = ["run", "laptop", *TRAINED, "stages=[data, sft]", "--out", str(run)]
    assert start_rcot(*words, stdout=-3).wait(timeout=900) == 0
    return run


@pytest.fixture
def branch(trained, tmp_path):
    """Return a function that makes a run of one GRPO stage on the trained run's shards and model.

    It returns the folder and the arguments of `rcot`.
    """

    def make(name: str, stage: str, *settings: str) -> tuple[Path, list[str]]:
        words = [*TRAINED, f"stages=[{stage}]", *settings]
        folder = RunFolder.claim(tmp_path / name, load_recipe("laptop", words)).root
        for part in ("shards", "sft", "data", "corpora"):
            shutil.copytree(trained / part, folder / part, symlinks=True)
        return folder, ["run", "laptop", *words, "--out", str(folder)]

    return make


@pytest.fixture
def variant(branch, start_rcot):
    """Return a function that runs a branch to its end.

    It returns the metrics of its steps and its stage's folder.
    """

    def go(stage: str, *settings: str) -> tuple[list[dict], Path]:
        # the pass that it brings back logs the largest difference between engine and trainer
        folder, words = branch("run", stage, "grpo.old_log_probs=recompute", *settings)
        log = folder.parent / "console.txt"
        process = start_rcot(*words, stdout=-3, stderr=log.open("w"))
        assert process.wait(timeout=900) == 0, log.read_text()[-3000:]
        rows = (folder / stage / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row) for row in rows], folder / stage

    return go
