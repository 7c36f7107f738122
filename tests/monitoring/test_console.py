"""What the terminal says of a run: every step, in words, with numbers of the stage alone."""

from __future__ import annotations

import ast
import json
import re
import time
from pathlib import Path

import pytest

import rcot_rl
from cluster.supervise.processes import MemoryWatch
from rcot_rl.monitoring.console import Console, EventReader
from rcot_rl.monitoring.metrics import Follower


def steps_of(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"grpo-ktg step (\d+)/48 ", text)]


@pytest.mark.parametrize("burst", [1, 2, 3, 48])
def test_steps_that_arrive_together_all_have_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], burst: int
) -> None:
    source = tmp_path / "verl.jsonl"
    follower, console = Follower(source, tmp_path / "metrics.jsonl"), Console()
    for first in range(1, 49, burst):
        with source.open("a") as file:
            for step in range(first, first + burst):
                data = {"training/global_step": step, "reward/mean": 3.0}
                file.write(json.dumps({"step": step, "data": data}) + "\n")
        for line in follower.poll():
            console.step("grpo-ktg", line, 48)
    assert steps_of(capsys.readouterr().err) == list(range(1, 49))


def test_the_end_of_work_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for done in (1, 2, 9, 9):
        console.progress("shards sft-1536", done, 9)
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["shards sft-1536 1/9", "shards sft-1536 9/9"]


def events(folder: Path) -> set[str]:
    """Names of the events that the processes of stages print, and of the facts beside them."""
    names = set()
    for room in ("asking", "inference"):
        for path in (folder / room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("say", "_say"):
                    names |= {k.arg for k in node.keywords if k.arg} - {"what", "rate", "done"}
                    names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return names


def test_events_are_told_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = [
        {"event": "note", "message": "980 videos"},
        {"event": "engine", "message": "starting vLLM on sft"},
        {"event": "ask", "what": "describe", "done": 3, "total": 9, "rate": "60 tokens, 20/s"},
        {"event": "ask", "message": "no progress yet"},
        {"event": "predict", "what": "sft on mevis", "done": 1, "total": 40},
        {"event": "heldout", "what": "sft, aks", "sampled": 1.25, "greedy": 1.5},
        ["no event"], "no event", None,
    ]  # fmt: skip
    log = tmp_path / "log.txt"
    reader = EventReader(log, Console(), "describe")
    log.write_text("".join(f"RCOT {json.dumps(event)}\n" for event in printed))
    reader.poll()
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "describe: 980 videos", "describe: starting vLLM on sft",
        "describe 3/9  60 tokens, 20/s", "describe: no progress yet",
        "describe: sft on mevis 1/40",
        "describe: held-out reward of sft, aks: sampled 1.25, greedy 1.50",
    ]  # fmt: skip
    known = {"event", "message", "total", "note", "ask", "predict", "heldout", "engine"}
    assert events(Path(rcot_rl.__file__).parent) <= known, "an event that is shown in no words"


def test_the_peak_is_the_stages_own() -> None:
    watch = MemoryWatch(interval_s=0.05)
    watch.start()
    try:
        block = bytearray(256 * 2**20)
        before = watch.peak_bytes()
        assert before > 256 * 2**20
        del block
        time.sleep(0.3)
        assert watch.peak_bytes() >= before, "the first stage's"
        watch.restart()
        assert 0 < watch.peak_bytes() < before - 128 * 2**20, "the second's"
    finally:
        watch.stop()
