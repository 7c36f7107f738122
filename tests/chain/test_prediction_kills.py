"""A predict stage whose processes are killed writes the predictions of an undisturbed one.

The real pool: Ray Data, vLLM, SAM2. The stage is run as `rcot run` does; a run whose driver was
killed is started again by hand, as a user would.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml

from rcot_rl.prediction_layout import heldout_rewards_file

pytestmark = pytest.mark.drill

ROOT = Path(__file__).parents[2]
RECIPE = {
    "extends": str(ROOT / "recipes" / "laptop.yaml"),
    "name": "kills",
    "stages": ["data", "predict"],
    "toy": {
        "preset": "lattice",
        "seed": 1,
        "corpora": [
            {"layout": "revos", "split": "train", "videos": 30},
            {"layout": "mevis", "split": "valid_u", "videos": 16},
        ],
    },
    "data": {
        "corpora": [{"dataset": "revos"}],
        "describe": "template",
        "allow_smaller": True,
        "sets": {
            "sft-384": {"ktg": 8, "aks": 8, "val": 48},
            "grpo-aks-480": {"aks": 8, "val": 48},
            "grpo-ktg-960": {"ktg": 8, "val": 48},
        },
    },
    "models": {"policy": "tiny-trained"},  # it finds objects, so that SAM2 has work
    "predict": {"videos_per_engine": 1},  # one row at a time, so that a process is hit at work
    "eval": {
        "benchmarks": [{"dataset": "mevis", "split": "valid_u"}],
        "checkpoints": ["base"],
        "heldout_prompts": 48,
        "heldout_samples": 16,
    },
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "kills.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return file


@pytest.fixture(scope="module")
def undisturbed(recipe, start_rcot, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = start_rcot("run", str(recipe), "--out", str(out))
    assert process.wait(400) == 0
    return out


def predictions(run: Path) -> dict[str, object]:
    """Return all files of predictions; traces without times and cache hits."""
    content: dict[str, object] = {}
    for folder in ("predictions", "predict/first-frame"):
        for file in sorted((run / folder).rglob("*")):
            if file.suffix == ".png":
                content[str(file.relative_to(run))] = file.read_bytes()
            if file.name == "trace.json":
                trace = json.loads(file.read_text())
                trace.pop("segment_seconds", None)
                for step in trace["steps"]:
                    # probabilities may differ in the last bits, with the requests in a batch
                    del step["seconds"], step["cached_tokens"], step["option_probabilities"]
                content[str(file.relative_to(run))] = trace
    return content


def _answered_once(run: Path) -> bool:
    log = run / "predict" / "attempt-1" / "log.txt"
    return log.is_file() and '"event": "heldout"' in log.read_text()


def _wrote_three(run: Path) -> bool:
    return _traces(run) >= 3


def _traces(run: Path) -> int:
    """Return the number of written predictions; folders may be renamed during the walk."""
    return sum("trace.json" in names for _, _, names in os.walk(run))


def victim(kind: str, mark: str) -> psutil.Process | None:
    """Return a process of the marked run: one whose name holds `kind`, or vLLM's own process."""
    for process in psutil.process_iter():
        try:
            name = " ".join([process.name(), *process.cmdline()])
            if process.environ().get("RCOT_TEST_MARK") == mark:
                if kind in name:
                    return process
                if kind == VLLM and REASONING in name and process.children():
                    return process.children()[0]
        except psutil.Error:
            continue
    return None


VLLM, REASONING = "vLLM", "Map(ReasoningProcess)"
ENGINE = (VLLM, REASONING)


@pytest.mark.parametrize("kind", [*ENGINE, "FlatMap(MaskProcess)", "rcot_rl.stages.predict_stage"])
def test_a_killed_process_changes_no_prediction(
    kind, recipe, undisturbed, start_rcot, tmp_path
) -> None:
    out, mark = tmp_path / "run", f"kill-{os.getpid()}-{kind}"
    arguments = ("run", str(recipe), "--out", str(out))
    process = start_rcot(*arguments, mark=mark)
    deadline = time.monotonic() + 300
    # the engine first answers held-out prompts of two tasks; the masks come last
    busy = _answered_once if kind in ENGINE else _wrote_three
    hit = reasoning = None
    while not busy(out):
        assert process.poll() is None and time.monotonic() < deadline
        # found before it is at work, because the search takes as long as some of the work
        reasoning = reasoning or victim(REASONING, mark)
        if kind != VLLM:
            hit = hit or victim(kind, mark)
        time.sleep(0.02)
    hit = hit or victim(kind, mark)
    assert hit is not None
    assert hit.is_running()
    hit.send_signal(signal.SIGKILL)
    written = _traces(out)
    if kind in ENGINE:
        assert reasoning is not None
        while reasoning.is_running():  # without vLLM, the process ends and is started again
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    status = process.wait(400)
    if kind.startswith("rcot_rl"):
        assert status != 0 or "attempt-2" in {p.name for p in (out / "predict").iterdir()}
        assert start_rcot(*arguments, mark=mark).wait(400) == 0
    else:
        assert status == 0
    assert predictions(out) == predictions(undisturbed)
    rewards = [json.loads(heldout_rewards_file(run).read_text()) for run in (out, undisturbed)]
    for task in ("aks", "ktg"):
        assert rewards[0][task]["base"]["greedy"] == rewards[1][task]["base"]["greedy"]
    traces = [t for name, t in predictions(out).items() if name.endswith("trace.json")]
    assert any(trace["boxes_source"] for trace in traces)
    assert written < len([name for name in predictions(out) if name.endswith("trace.json")])
