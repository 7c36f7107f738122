"""Descriptions and traces by the tiny policy, through the real vLLM on Ray Data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import psutil
import pytest
import yaml

from data_pipelines.toy.layouts import write_corpus
from data_pipelines.verify.check_sets import check
from rcot_rl.annotation import describer, tracer
from rcot_rl.annotation.annotator import Annotator
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Return a recipe on a corpus of single-target expressions."""
    folder = tmp_path_factory.mktemp("annotation")
    write_corpus(folder / "ytvos", "ref-youtube-vos", "train", 120, 4, "lattice")
    path = folder / "recipe.yaml"
    values = {
        "extends": "laptop.yaml",
        "name": "annotation",
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
def taught(recipe, run_rcot: Callable[..., CompletedProcess[str]]) -> Path:
    """Return a policy that reasons: the tiny base after the laptop's CoT-SFT."""
    done = run_rcot(
        "run",
        "laptop",
        "--out",
        recipe.parent / "run",
        "stages=[data, sft]",
        "toy.corpora=[{layout: ref-youtube-vos, split: train, videos: 300}]",
        "data.corpora=[{dataset: ref-youtube-vos}]",
        "data.sets={sft-384: {ktg: 1024, aks: 512, val: 0}, "
        "grpo-aks-480: {aks: 8, val: 0}, grpo-ktg-960: {ktg: 8, val: 0}}",
        "data.single_multi=null",
        "data.describe=template",
        "train.sft.epochs=2",
    )
    assert done.returncode == 0, done.stderr
    return recipe.parent / "run" / "sft" / "model"


def _lines(path: Path) -> list[dict]:
    return [json.loads(row) for row in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def described(recipe, run_rcot: Callable[..., CompletedProcess[str]]) -> Path:
    done = run_rcot("data", "describe", recipe, "--out", recipe.parent / "texts")
    assert done.returncode == 0, done.stderr
    return recipe.parent / "texts" / "descriptions.jsonl"


@pytest.mark.slow
def test_every_video_is_described_once(recipe, described, run_rcot):
    lines = _lines(described)
    assert len(lines) == 120 and all(line["description"] for line in lines)
    cache = described.with_name("descriptions.ledger.jsonl")
    before = cache.read_bytes()
    again = run_rcot("data", "describe", recipe, "--out", described.parent)
    assert again.returncode == 0 and "120 of them described before" in again.stderr
    assert cache.read_bytes() == before


@pytest.mark.drill
def test_a_killed_trace_resumes_and_gives_the_same_file(
    recipe, described, taught, tmp_path, run_rcot
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run_rcot("data", "trace", recipe, "--out", whole)
    assert done.returncode == 0, done.stderr
    _kill_half_way(recipe, cut)
    asked = {r["key"] for r in _lines(cut / "traces.ledger.jsonl")[1:]}
    assert asked
    with (cut / "traces.ledger.jsonl").open("ab") as file:
        file.write(b'{"key": "half a li')
    done = run_rcot("data", "trace", recipe, "--out", cut)
    assert done.returncode == 0, done.stderr
    assert (cut / "traces.jsonl").read_bytes() == (whole / "traces.jsonl").read_bytes()
    counts = Counter(r.get("key") for r in _lines(cut / "traces.ledger.jsonl")[1:])
    assert set(counts.values()) == {1} and asked <= set(counts)
    _build(run_rcot, recipe, whole / "traces.jsonl", tmp_path / "shards")


def _kill_half_way(recipe: Path, out: Path) -> None:
    """Send SIGKILL, like an out-of-memory killer, as soon as a few responses are stored."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rcot_rl.cli", "data", "trace", str(recipe), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    cache = out / "traces.ledger.jsonl"
    deadline = time.monotonic() + 400
    while not (cache.is_file() and cache.read_bytes().count(b"\n") > 3):
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


def _build(
    run_rcot: Callable[..., subprocess.CompletedProcess[str]],
    recipe: Path,
    traces: Path,
    out: Path,
) -> None:
    """Build shards of those traces and check them and their statistics."""
    done = run_rcot(
        "data", "build", recipe, f"data.trace={traces}", "canvas.image=112", "--out", out
    )
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


def _annotator(*responses: str) -> SimpleNamespace:
    """Return an annotator whose cache has these responses under 0, 1, …."""
    records = {k: {"response": text, "tokens": 9} for k, text in enumerate(responses)}
    return SimpleNamespace(cache=SimpleNamespace(records=records))


def test_runs_with_the_same_seed_of_the_data_share_texts(tmp_path: Path) -> None:
    file = tmp_path / "descriptions.ledger.jsonl"

    def opened(*overrides: str) -> Annotator:
        recipe = load_recipe("laptop", overrides)
        return Annotator(recipe, recipe.data.describer, "describe", file, {})

    with opened("seed=1", "data.seed=7").cache as cache:
        cache.add("video", {"response": "a red circle"})
    with opened("seed=2", "data.seed=7").cache as cache:
        assert "video" in cache
    for overrides in (["seed=7", "data.seed=8"], ["seed=1"]):
        with pytest.raises(InputError, match="was created with seed = 7"):
            opened(*overrides)


def test_descriptions_are_written_without_control_tokens():
    annotator = _annotator(HOSTILE, f"<think>x</think><answer>{HOSTILE}</answer>", "a fox")
    asks = {(0, str(k)): SimpleNamespace(key=k) for k in range(3)}
    corpora = [SimpleNamespace(dataset="mevis")]
    lines = list(describer._lines(corpora, asks, annotator))
    assert [line["description"] for line in lines] == [PLAIN, PLAIN, "a fox"]


def test_traces_are_written_without_control_tokens_and_with_their_tags():
    stub = object.__new__(tracer._Tracer)
    wanted = SimpleNamespace(key=("aks", "mevis", "v", "0", "00000"))
    stub.refused, stub.tries = {}, 1
    template = "<think>{}</think>\n<answer>A</answer>"
    stub.annotator = _annotator(template.format(HOSTILE))
    stub._causes = lambda wanted, number: ()
    stub._ask = lambda wanted, number: SimpleNamespace(key=number)
    (line,) = stub.lines([wanted])
    assert line["response"] == template.format(PLAIN) and line["accepted"]
