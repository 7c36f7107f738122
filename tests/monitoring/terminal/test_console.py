"""Terminal output of a run: one line per step, readable events, memory of one stage."""

from __future__ import annotations

import ast
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from rich.cells import cell_len

import rcot_rl
from cluster.supervise import processes
from cluster.supervise.processes import MemoryWatch
from rcot_rl.errors import InputError
from rcot_rl.events import EventReader, Kind, child_process, emit
from rcot_rl.monitoring.run_files.metrics import StepCopier
from rcot_rl.monitoring.terminal.console import Console


def steps_of(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"grpo-ktg step (\d+)/48 ", text)]


@pytest.mark.parametrize("burst", [1, 2, 3, 48])
def test_steps_that_arrive_together_all_have_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], burst: int
) -> None:
    source = tmp_path / "verl.jsonl"
    follower, console = StepCopier(source, tmp_path / "metrics.jsonl"), Console()
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
        console.progress("shards sft-384", done, 9)
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["shards sft-384 1/9", "shards sft-384 9/9"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Return a list that holds the time of both clocks; 27 November 2026, 20:00 in UTC."""
    now = [1795809600.0]
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    yield now
    monkeypatch.undo()
    time.tzset()


def test_progress_in_a_log_has_a_line_per_minute_with_rate_and_date_of_the_end(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    console = Console()
    for done in range(1, 601):
        console.progress("expressions", done, 600)
        clock[0] += 0.5
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "expressions 1/600",
        "expressions 121/600  2/s, 4 min left (27 Nov 20:04)",
        "expressions 241/600  2/s, 3 min left (27 Nov 20:04)",
        "expressions 361/600  2/s, 2 min left (27 Nov 20:04)",
        "expressions 481/600  2/s, 60 s left (27 Nov 20:04)",
        "expressions 600/600",
    ]


def run_of_a_stage(console: Console, clock: list[float], total: int, seconds: float) -> None:
    console.stage("grpo-ktg")
    for step in range(1, total + 1):
        clock[0] += seconds
        metrics = dict.fromkeys(("reward/mean", "group/zero_variance_fraction"), 0.5)
        metrics |= {"response_length/mean": 1234.0, "actor/kl_loss": 0.0123}
        console.step("grpo-ktg", {"step": step, "time": clock[0], **metrics}, total)


def test_a_log_names_stage_rate_time_left_and_date_within_80_columns(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    console = Console(["data", "sft", "grpo-ktg", "predict"])
    run_of_a_stage(console, clock, 1000, 92.0)
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "[00:00] == grpo-ktg, stage 3 of 4"
    steps = [line for line in lines if " step " in line]
    assert [int(line.split()[3].partition("/")[0]) for line in steps] == list(range(1, 1001))
    assert all("reward 0.50  KL 0.0123  length 1234" in line for line in steps)
    # 500 steps of 92 s are 12.8 h, from 27 November 20:00 + 12.8 h
    assert "grpo-ktg: 12.8 h left (28 Nov 21:33)" in "\n".join(lines)
    assert all(line.endswith("length 1234  92 s") for line in steps[1:])


def test_a_restart_does_not_change_the_rate(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    console = Console()
    for step in range(1, 8):
        clock[0] += 600 if step == 4 else 5
        console.step("grpo-ktg", {"step": step, "time": clock[0]}, 48)
    assert "step 7/48  5 s\n" in capsys.readouterr().err


LONG = (
    "grpo-aks attempt-1 ended with status 1 after step 12.\n"
    "The stacks of its processes are in /tmp/" + "a-folder/" * 12 + "stacks and so on, "
    "with an explanation that does not fit into one line of a narrow terminal."
)


def test_long_messages_are_wrapped_at_words_and_paths_stay_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Console().line(LONG)
    lines = capsys.readouterr().err.splitlines()
    assert " ".join(" ".join(lines).split()) == "[00:00] " + " ".join(LONG.split())
    assert all(len(line) <= 80 for line in lines if "a-folder" not in line)
    assert all(line.startswith(" " * 8) for line in lines[1:])


def screen_lines(output: str) -> list[str]:
    """Return every state that a line of the screen had."""
    states = output.replace("\r\n", "\n").replace("\r\x1b[K", "\n").splitlines()
    return [state for state in states if state]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_terminal_has_one_live_line_that_never_wraps(
    columns: int, terminal_program: Callable
) -> None:
    program = f"""
from rcot_rl.monitoring.terminal.console import Console
console = Console(["data", "sft", "grpo-ktg"])
console.stage("grpo-ktg")
values = {{"reward/mean": 1.0, "actor/kl_loss": 0.1, "response_length/mean": 300.0}}
for step in range(1, 41):
    console.step("grpo-ktg", {{"step": step, "time": 100.0 * step, **values}}, 40)
    if step == 20:
        console.line({LONG.replace("a-folder/" * 12, "")!r})
console.progress("expressions " + "字" * 90, 1, 3)
console.line("the end")
"""
    running = terminal_program("-c", program, columns=columns)
    assert running.end() == 0
    output = running.output
    states = screen_lines(output)
    assert max(cell_len(state) for state in states) <= columns
    live = [state for state in states if state.startswith("3/3 grpo-ktg step ")]
    assert len(live) == 39 and all(f" step {n}/40" in s for n, s in enumerate(live, start=1))
    assert "100 s/step, 33 min left (" in live[19]
    shown = [row.rpartition("\x1b[K")[2] for row in output.replace("\r\n", "\n").split("\n")]
    kept = [line for line in shown if "grpo-ktg step" in line]
    assert len(kept) == 1 and "] grpo-ktg step 40/40  reward 1.00" in kept[0], "others are erased"


def test_generation_shows_tokens_and_the_time_left(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    console = Console()
    for done in (10, 110):
        event = {"event": "progress", "what": "descriptions", "done": done, "total": 1010}
        console.event("descriptions", event | {"rate": "12 tokens/s"})
        clock[0] += 100
    last = capsys.readouterr().err.splitlines()[-1]
    # 100 responses in 100 s, and 900 are left
    assert last.endswith("] descriptions 110/1010  12 tokens/s, 15 min left (27 Nov 20:16)")


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
        emit("progress", what="responses", done=3, total=9, rate="60 tokens, 20/s")
        emit("progress", what="sft on mevis", done=1, total=40)
        print("a line of vLLM's\nRCOT no JSON\nRCOT [1]\nRCOT " + "[" * 5000)
        emit("heldout", what="aks reward of sft", sampled=1.25, greedy=1.5)
        monkeypatch.undo()
        file.write('RCOT {"event": "note", ')
    for event in reader.poll():
        console.event("describe", event)
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "describe: 980 videos",
        "describe: responses 3/9  60 tokens, 20/s",
        "describe: sft on mevis 1/40",
        "describe: held-out aks reward of sft: sampled 1.25, greedy 1.50",
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


def test_a_memory_watch_uses_little_of_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that takes 30 ms of a core is not repeated within 3 s, whatever the interval is."""
    samples: list[int] = []

    def slow(pid: int) -> int:
        if pid == os.getpid():
            samples.append(pid)
            end = time.thread_time() + 0.03
            while time.thread_time() < end:
                pass
        return 1

    monkeypatch.setattr(processes, "pss_bytes", slow)
    watch = MemoryWatch(interval_s=0.01)
    watch.start()
    time.sleep(1.5)
    watch.stop()
    assert len(samples) == 1


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
