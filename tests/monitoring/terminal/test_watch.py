"""`rcot watch` shows a run that is in progress, finished or another user's, and writes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.cells import cell_len

from rcot_rl.errors import InputError
from rcot_rl.monitoring.judgement.run_verdict import judge_run
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.run_files.run_status import RunStatus, write_status
from rcot_rl.monitoring.terminal.watch import ASCII_BARS, Screen, frame, sparkline
from rcot_rl.monitoring.terminal.watched_run import MetricsTail, WatchedRun
from rcot_rl.recipe.loader import load_recipe

STAGES = ["data", "sft", "grpo-aks", "grpo-ktg", "predict", "eval", "report"]
COMMAND = ["-m", "rcot_rl.cli", "watch"]


def step_line(step: int, **values: object) -> str:
    line = {
        "step": step,
        "time": 1000.0 + 5 * step,
        "reward/mean": 3 + step / 100,
        "reward/format/mean": 2.5,
        "reward/accuracy/mean": 0.5 + step / 100,
        "group/zero_variance_fraction": 0.125,
        "response_length/mean": 300.0,
        "actor/kl_loss": 0.0123,
        "timing_s/step": 4.5,
        "memory_gib/node/used_max": 8.6,
        "memory_gib/node/free_min": 14.9,
    }
    return json.dumps(line | values) + "\n"


def status_of(stage: str = "grpo-ktg", **values: object) -> RunStatus:
    now = time.time()
    fields = {"state": "running", "started": now - 600, "updated": now, "host": "node-7", "pid": 1}
    fields |= {
        "stages": STAGES,
        "stage": stage,
        "stage_started": now - 60,
        "step": 20,
        "total_steps": 48,
    }
    return RunStatus(**(fields | {"seconds_per_step": 5.0} | values))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run that trains grpo-ktg: 20 of 48 steps, in the second attempt."""
    root = tmp_path / "run"
    record = {"recipe": load_recipe("laptop").model_dump(mode="json")}
    for stage in STAGES[:3]:
        (root / stage / "attempt-1").mkdir(parents=True)
        facts = {"minutes": 2.5, "peak_gib": 6.5}
        (root / stage / "done.json").write_text(json.dumps(facts))
    (root / "recipe.yaml").write_text(yaml.safe_dump(record))
    for attempt in (1, 2):
        (root / "grpo-ktg" / f"attempt-{attempt}").mkdir(parents=True)
    steps = "".join(step_line(step) for step in range(1, 21))
    (root / "grpo-ktg" / "metrics.jsonl").write_text(steps)
    write_status(root, status_of(tracking={"wandb": "https://example.org/group"}))
    return root


def add_results(run: Path) -> None:
    rewards = {"ktg": {"sft": {"sampled": {"mean": 3.1}}, "grpo-ktg": {"sampled": {"mean": 3.9}}}}
    (run / "predict").mkdir()
    (run / "predict" / "rewards.json").write_text(json.dumps(rewards))
    (run / "eval").mkdir()
    scores = {"checkpoints": {"sft": {"J&F": 42.6}, "grpo-ktg": {"J&F": 49.1}}}
    (run / "eval" / "mevis-valid_u.json").write_text(json.dumps(scores))


def lines_of(run: Path, width: int = 80, height: int | None = None, unicode: bool = True):
    watched = WatchedRun(run)
    watched.poll()
    encoding = "utf-8" if unicode else "ascii"
    return [line.plain for line in frame(watched, Screen(width, height, unicode, encoding))]


def test_a_frame_shows_stages_pace_rewards_with_maxima_and_results(run: Path) -> None:
    add_results(run)
    text = "\n".join(lines_of(run))
    assert "laptop  running for 10 min on node-7" in text
    assert "✓ data" in text and "3 min" not in text.splitlines()[0]
    assert "▶ grpo-ktg  running  step 20/48, 5 s/step, 2 min left (" in text
    assert "attempt 2" in text and "· predict   pending" in text
    (reward,) = [line.split() for line in text.splitlines() if line.startswith("reward")]
    assert reward[1] == "".join(sorted(reward[1])) and reward[1][0] == "▁" and reward[1][-1] == "█"
    assert reward[2:] == ["3.20", "3.01", "3.20", "6"]
    for name in ("  format", "  accuracy", "zero variance", "length", "KL", "s/step"):
        assert f"\n{name}" in text, name
    assert "held-out ktg, sampled  sft 3.10 → grpo-ktg 3.90" in text
    assert "J&F mevis-valid_u      sft 42.6 → grpo-ktg 49.1" in text
    assert "8.6 GiB used, 14.9 GiB free" in text and "https://example.org/group" in text


@pytest.mark.parametrize("height", [24, 16, 50])
@pytest.mark.parametrize("width", [80, 40, 200])
def test_frames_fit_the_screen(run: Path, width: int, height: int) -> None:
    add_results(run)
    lines = lines_of(run, width, height)
    assert len(lines) <= height and max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    assert "grpo-ktg" in text and "\nreward" in text, "the most important lines are kept"


def test_without_unicode_the_frame_is_ascii(run: Path) -> None:
    add_results(run)
    text = "\n".join(lines_of(run, unicode=False))
    assert text.isascii() and "> grpo-ktg" in text and "sft 42.6 -> grpo-ktg 49.1" in text
    assert sparkline([0.0, 1.0], 10, unicode=False) == ASCII_BARS[1] + ASCII_BARS[-1]


def test_a_sparkline_averages_and_leaves_gaps() -> None:
    assert sparkline([0.0, 2.0, None, None, 4.0, 4.0], 3) == "▁ █"
    assert sparkline([], 5) == "" and sparkline([None], 5) == "" and sparkline([7.0], 5) == "▁"


def test_untrusted_text_cannot_control_the_terminal(run: Path) -> None:
    name = "\x1b]0;owned\x07\x1b[2J"
    row = {"time": 1.0, "step": 3, "cause": "error", "retry": True, "text": f"died {name}\x9b1m\n!"}
    (run / "data" / "attempts.jsonl").write_text(json.dumps(row) + "\n")
    write_status(run, status_of(host=name, work=name, tracking={name: name}))
    with (run / "grpo-ktg" / "metrics.jsonl").open("a") as file:
        file.write(step_line(21, **{f"reward/{name}/mean": 1.0}))
    lines = lines_of(run)
    assert any("died" in line for line in lines)
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("junk", ["", "[]", "{[", '{"state": 3}', "null"])
def test_broken_files_never_end_the_watch(run: Path, junk: str) -> None:
    add_results(run)
    for file in run.rglob("*.json*"):
        file.write_text(junk)
    with (run / "grpo-ktg" / "metrics.jsonl").open("w") as file:
        file.write('{"step": "x"}\n7\n' + step_line(1, **{"reward/mean": "high", "time": None}))
        file.write(step_line(2, **{"reward/mean": float("nan"), "actor/kl_loss": float("inf")}))
        file.write('{"step": 3, "unfinished')
    assert any("grpo-ktg, steps 1 to 2" in line for line in lines_of(run))


@pytest.mark.parametrize("value", ['"x"', "1e999", "-1", "[]", "null", "NaN"])
@pytest.mark.parametrize("field", ["step", "total_steps", "seconds_per_step", "updated", "work"])
def test_any_value_in_the_status_is_survived(run: Path, field: str, value: str) -> None:
    text = json.dumps(json.loads((run / "status.json").read_text()) | {field: "VALUE"})
    (run / "status.json").write_text(text.replace('"VALUE"', value))
    assert any("grpo-ktg, steps 1 to 20" in line for line in lines_of(run))


def test_a_killed_run_is_told_from_a_running_one(run: Path) -> None:
    write_status(run, status_of(updated=time.time() - 300))
    assert "no sign of life since" in lines_of(run)[0]
    watched = WatchedRun(run)
    watched.poll()
    assert not watched.is_finished, "its host's clock may differ"


def test_a_failed_run_shows_its_verdict(run: Path) -> None:
    verdict = "grpo-ktg attempt-2 ended with status 1 after step 20. " * 3
    write_status(run, status_of(state="failed", message=verdict))
    text = "\n".join(lines_of(run))
    assert "failed" in text.splitlines()[0] and "last failure: grpo-ktg attempt-2" in text


def test_a_finished_run_shows_the_verdict_of_the_report(run: Path) -> None:
    headline = judge_run(RunReader(run)).headline
    assert headline not in " ".join(lines_of(run)), "too early"
    write_status(run, status_of(state="done"))
    assert " ".join(headline.split()) in " ".join(" ".join(lines_of(run)).split())


def test_alerts_are_shown_once(run: Path) -> None:
    file = run / "grpo-ktg" / "metrics.jsonl"
    with file.open("a") as stream:
        for step in range(21, 41):
            stream.write(step_line(step, **{"reward/mean": 0.2, "actor/kl_loss": 0.9}))
    watched = WatchedRun(run)
    watched.poll()
    codes = [alert.code for alert in watched.alerts]
    assert "reward_collapse" in codes and "kl_runaway" in codes
    os.replace(_copy(file), file)  # a resumed stage rewrites the file
    watched.poll()
    assert [alert.code for alert in watched.alerts] == codes
    lines = [line.plain for line in frame(watched, Screen(80, 24, True))]
    assert any(line.startswith("error: Reward collapsed (grpo-ktg, step ") for line in lines)


def _copy(file: Path) -> Path:
    copy = file.with_suffix(".copy")
    copy.write_bytes(file.read_bytes())
    return copy


def test_only_new_lines_are_read_and_repeated_steps_replace_theirs(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.poll() == [] and tail.steps == []
    path.write_text(step_line(1) + step_line(2) + step_line(3)[:10])
    assert [line["step"] for line in tail.poll()] == [1, 2]
    with path.open("a") as file:
        file.write(step_line(3)[10:] + step_line(2, **{"reward/mean": 9.0, "time": 1.0}))
    assert [line["step"] for line in tail.poll()] == [3, 2]
    assert tail.steps == [1, 2] and tail.curves["reward/mean"] == [3.01, 9.0]
    copy = tmp_path / "new"
    copy.write_text(step_line(1) + step_line(2, **{"train/loss": 0.5}))
    os.replace(copy, path)
    assert [line["step"] for line in tail.poll()] == [2], "step 1 has not changed"
    assert tail.curves["train/loss"] == [None, 0.5] and tail.poll() == []


def test_a_missing_or_foreign_folder_is_one_error(tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "nope", "no such run folder"), (tmp_path, "recipe.yaml")):
        with pytest.raises(InputError, match=message) as caught:
            WatchedRun(folder)
        assert caught.value.faults == [f"{folder}: {caught.value.message}"]


def test_no_terminal_gets_one_frame_of_80_columns(run: Path) -> None:
    done = subprocess.run([sys.executable, *COMMAND, run], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "\x1b" not in done.stdout and "grpo-ktg" in done.stdout
    assert max(map(cell_len, done.stdout.splitlines())) <= 80


NO_WRITES = """
import os, sys
def hook(event, arguments):
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
    if event == "open" and str(arguments[0]).startswith(sys.argv[2]):
        assert not arguments[2] & writes, arguments
    if event in ("os.mkdir", "os.rename", "os.remove", "os.utime", "os.link", "fcntl.flock"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(hook)
from rcot_rl.cli.main import main
main()
"""


def test_the_run_folder_is_only_read(run: Path) -> None:
    add_results(run)
    before = {p: p.lstat().st_mtime_ns for p in run.rglob("*")}
    command = [sys.executable, "-c", NO_WRITES, "watch", str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "held-out" in done.stdout, done.stderr
    assert {p: p.lstat().st_mtime_ns for p in run.rglob("*")} == before


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "Ctrl-C"])
def test_a_run_in_progress_is_followed_until_a_key(
    run: Path, terminal_program: Callable, key: bytes
) -> None:
    program = terminal_program(*COMMAND, str(run), "--every", "0.2")
    program.read_until("step 20/48")
    with (run / "grpo-ktg" / "metrics.jsonl").open("a") as file:
        file.write(step_line(21, **{"reward/mean": 5.55}))
    write_status(run, status_of(step=21))
    program.read_until("5.55")
    program.press(key)
    assert program.end() == 0
    assert "Traceback" not in program.output and "Aborted" not in program.output
    frames = program.frames()
    assert len(frames) >= 2
    for lines in frames[:-1]:
        assert len(lines) <= 24 and max(map(cell_len, lines)) <= 80
    assert program.output.rstrip().endswith("14.9 GiB free"), "the last frame stays"


def test_a_resized_terminal_is_redrawn_to_fit(run: Path, terminal_program: Callable) -> None:
    program = terminal_program(*COMMAND, str(run), "--every", "30")
    program.read_until("step 20/48")
    program.resize(50, 12)
    before = len(program.frames())
    program.read_until("laptop", seconds=10)
    program.press(b"q")
    assert program.end() == 0
    lines = program.frames()[before]
    assert len(lines) <= 12 and max(map(cell_len, lines)) <= 50


def test_the_watch_ends_with_the_run(run: Path, terminal_program: Callable) -> None:
    program = terminal_program(*COMMAND, str(run), "--every", "0.2", NO_COLOR="1")
    program.read_until("step 20/48")
    write_status(run, status_of(state="done"))
    assert program.end() == 0
    assert "done" in program.output
    colours = [part for part in program.output.split("\x1b[")[1:] if part[:3] in ("31m", "32m")]
    assert not colours, "NO_COLOR"


def test_a_finished_run_is_shown_once(run: Path, terminal_program: Callable) -> None:
    write_status(run, status_of(state="done"))
    program = terminal_program(*COMMAND, str(run))
    assert program.end() == 0
    assert "\x1b[?1049h" not in program.output and program.output.count("laptop") == 1
