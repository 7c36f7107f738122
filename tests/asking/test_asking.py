"""Descriptions and traces by the tiny policy, through the real vLLM on Ray Data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from data_pipelines.toy.layouts import write_corpus
from data_pipelines.verify.check_sets import check
from rcot_rl.annotation import describe, trace

RCOT = [sys.executable, "-m", "rcot_rl.cli"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe on clips of one target each."""
    folder = tmp_path_factory.mktemp("asking")
    write_corpus(folder / "ytvos", "ref-youtube-vos", "train", 120, 4, "lattice")
    path = folder / "recipe.yaml"
    values = {
        "extends": "laptop.yaml",
        "name": "asking",
        "data": {
            "corpora": [{"dataset": "ref-youtube-vos", "root": str(folder / "ytvos")}],
            "sets": {"sft-16": {"ktg": 2, "aks": 14}},
            "describe": str(folder / "texts" / "descriptions.jsonl"),
            "single_multi": None,
            "describer": {"model": "tiny", "temperature": 0.0},
            "tracer": {
                "model": str(folder / "run" / "sft" / "model"),
                "max_tokens": 160,
                "min_words": 3,
                "forbid_coordinates": False,
                "tries": 2,
                "replacements": 12,
            },
        },
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def taught(recipe) -> Path:
    """A policy that reasons: the tiny base after the laptop's CoT-SFT."""
    done = _rcot(
        "run", "laptop", "--out", recipe.parent / "run", "stages=[data, sft]",
        "toy.corpora=[{layout: ref-youtube-vos, split: train, videos: 300}]",
        "data.corpora=[{dataset: ref-youtube-vos}]",
        "data.sets={sft-1536: {ktg: 1024, aks: 512, val: 0}, "
        "grpo-aks-640: {aks: 8, val: 0}, grpo-ktg-960: {ktg: 8, val: 0}}",
        "data.single_multi=null", "data.describe=template",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return recipe.parent / "run" / "sft" / "model"


def _rcot(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RCOT, *map(str, arguments)], capture_output=True, text=True, timeout=900, check=False
    )


def _lines(path: Path) -> list[dict]:
    return [json.loads(row) for row in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def described(recipe) -> Path:
    done = _rcot("data", "describe", recipe, "--out", recipe.parent / "texts")
    assert done.returncode == 0, done.stderr
    return recipe.parent / "texts" / "descriptions.jsonl"


@pytest.mark.slow
def test_every_video_is_described_once(recipe, described):
    lines = _lines(described)
    assert len(lines) == 120 and all(line["description"] for line in lines)
    ledger = described.with_name("descriptions.ledger.jsonl")
    before = ledger.read_bytes()
    again = _rcot("data", "describe", recipe, "--out", described.parent)
    assert again.returncode == 0 and "120 of them described before" in again.stderr
    assert ledger.read_bytes() == before


@pytest.mark.drill
def test_a_killed_tracing_goes_on_and_ends_the_same(recipe, described, taught, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = _rcot("data", "trace", recipe, "--out", whole)
    assert done.returncode == 0, done.stderr
    _kill_half_way(recipe, cut)
    asked = {r["key"] for r in _lines(cut / "traces.ledger.jsonl")[1:]}
    assert asked
    with (cut / "traces.ledger.jsonl").open("ab") as file:
        file.write(b'{"key": "half a li')
    done = _rcot("data", "trace", recipe, "--out", cut)
    assert done.returncode == 0, done.stderr
    assert (cut / "traces.jsonl").read_bytes() == (whole / "traces.jsonl").read_bytes()
    counts = Counter(r.get("key") for r in _lines(cut / "traces.ledger.jsonl")[1:])
    assert set(counts.values()) == {1} and asked <= set(counts)
    _build(recipe, whole / "traces.jsonl", tmp_path / "shards")


def _kill_half_way(recipe: Path, out: Path) -> None:
    """SIGKILL, as an out-of-memory killer would, as soon as a few answers are there."""
    process = subprocess.Popen(
        [*RCOT, "data", "trace", str(recipe), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    ledger = out / "traces.ledger.jsonl"
    deadline = time.monotonic() + 400
    while not (ledger.is_file() and ledger.read_bytes().count(b"\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    tree = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for child in tree:
        if child.is_running():
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue


def _build(recipe: Path, traces: Path, out: Path) -> None:
    """Shards of those traces: exact answers, the model's reasoning, its acceptance in the card."""
    done = _rcot("data", "build", recipe, f"data.trace={traces}", "data.canvas=112", "--out", out)
    assert done.returncode == 0, done.stderr
    assert check(out).ok, check(out).faults
    manifest = json.loads((out / "sft-16" / "manifest.json").read_text())
    lines = _lines(traces)
    for task, counts in manifest["traces"].items():
        of_task = [line for line in lines if line["task"] == task]
        assert counts["responses"] == len(of_task)
        assert counts["accepted"] == sum(line["accepted"] for line in of_task)
        causes = Counter(cause for line in of_task for cause in line["causes"])
        assert {k: v for k, v in counts.items() if k.startswith("refused/")} == {
            f"refused/{cause}": n for cause, n in causes.items()
        }
    assert manifest["traces"]["ktg"]["accepted"] == 2
    card = (out / "sft-16" / "README.md").read_text()
    assert "| acceptance |" in card and "refused/" in card


HOSTILE = "a <|im_end|> and <image> <tool_call>"
PLAIN = "a (|im_end|) and (image) (tool_call)"


def _asked(*responses: str) -> SimpleNamespace:
    """A session whose ledger holds these responses under 0, 1, …."""
    records = {k: {"response": text, "tokens": 9} for k, text in enumerate(responses)}
    return SimpleNamespace(ledger=SimpleNamespace(records=records))


def test_descriptions_are_written_without_control_tokens():
    session = _asked(HOSTILE, f"<think>x</think><answer>{HOSTILE}</answer>", "a fox")
    asks = {(0, str(k)): SimpleNamespace(key=k) for k in range(3)}
    corpora = [SimpleNamespace(dataset="mevis")]
    lines = list(describe._lines(corpora, asks, session))
    assert [line["description"] for line in lines] == [PLAIN, PLAIN, "a fox"]


def test_traces_are_written_without_control_tokens_and_with_their_tags():
    tracer = object.__new__(trace._Tracer)
    wanted = SimpleNamespace(key=("aks", "mevis", "v", "0", "00000"))
    tracer.refused, tracer.tries = {}, 1
    said = "<think>{}</think>\n<answer>A</answer>"
    tracer.session = _asked(said.format(HOSTILE))
    tracer._causes = lambda wanted, number: ()
    tracer._ask = lambda wanted, number: SimpleNamespace(key=number)
    (line,) = tracer.lines([wanted])
    assert line["response"] == said.format(PLAIN) and line["accepted"]
