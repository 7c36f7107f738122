"""Terminal output of a run: one line per step, readable events, memory of one stage."""

from __future__ import annotations

import ast
import json
import re
import time
from pathlib import Path
from typing import get_args

import pytest

import rcot_rl
from cluster.supervise.processes import MemoryWatch
from rcot_rl.errors import InputError
from rcot_rl.events import EventReader, Kind, child_process, emit
from rcot_rl.monitoring.console import Console
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


def test_finished_work_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for done in (1, 2, 9, 9):
        console.progress("shards sft-1536", done, 9)
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["shards sft-1536 1/9", "shards sft-1536 9/9"]


def test_progress_in_a_log_has_a_line_per_minute_with_rate_and_eta(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console()
    for done in range(1, 601):
        console.progress("expressions", done, 600)
        now += 0.5
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "expressions 1/600",
        "expressions 121/600  2/s, ETA 04:00",
        "expressions 241/600  2/s, ETA 03:00",
        "expressions 361/600  2/s, ETA 02:00",
        "expressions 481/600  2/s, ETA 01:00",
        "expressions 600/600",
    ]


def emitted(folder: Path) -> set[str]:
    """Return the kinds of events that processes of stages print."""
    kinds = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "emit":
                assert isinstance(node.args[0], ast.Constant), path
                kinds.add(node.args[0].value)
    return kinds


def test_events_are_printed_readably(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, console = tmp_path / "log.txt", Console()
    log.write_text('RCOT {"event": "note", "message": "of an earlier attempt"}\n')
    reader = EventReader(log)
    with log.open("a") as file:
        monkeypatch.setattr("sys.stdout", file)
        emit("note", message="980 videos")
        emit("progress", what="describe", done=3, total=9, rate="60 tokens, 20/s")
        emit("progress", what="sft on mevis", done=1, total=40)
        print("a line of vLLM's\nRCOT no JSON\nRCOT [1]\nRCOT " + "[" * 5000)
        emit("heldout", what="sft, aks", sampled=1.25, greedy=1.5)
        monkeypatch.undo()
        file.write('RCOT {"event": "note", ')
    for event in reader.poll():
        console.event("describe", event)
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "describe: 980 videos",
        "describe 3/9  60 tokens, 20/s",
        "describe: sft on mevis 1/40",
        "describe: held-out reward of sft, aks: sampled 1.25, greedy 1.50",
    ]
    with log.open("a") as file:
        file.write('"message": "whole now"}\n')
    assert [event["message"] for event in reader.poll()] == ["whole now"]


def test_every_kind_of_event_is_known() -> None:
    assert emitted(Path(rcot_rl.__file__).parent) == set(get_args(Kind))


def test_a_childs_input_error_becomes_a_fault_event_and_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended, child_process():
        raise InputError.of_all([InputError("no rows", file="a.parquet"), InputError("too long")])
    assert ended.value.code == 2
    event = json.loads(capsys.readouterr().out.removeprefix("RCOT "))
    assert event == {"event": "fault", "faults": ["a.parquet: no rows", "too long"]}


def test_the_memory_peak_restarts_with_each_stage() -> None:
    watch = MemoryWatch(interval_s=0.05)
    watch.start()
    try:
        block = bytearray(256 * 2**20)
        before = watch.peak_bytes()
        assert before > 256 * 2**20
        del block
        time.sleep(0.3)
        assert watch.peak_bytes() >= before, "peak of the first stage"
        watch.restart()
        assert 0 < watch.peak_bytes() < before - 128 * 2**20, "peak of the second stage"
    finally:
        watch.stop()
