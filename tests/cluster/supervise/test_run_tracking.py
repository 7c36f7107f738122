"""Followers live beside the stages: no stage ends them, and they end with the command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from cluster.supervise import keeper, run_tracking
from cluster.supervise.processes import Host, StageFailed
from cluster.supervise.run_tracking import RunTracking, send_rest
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.terminal.console import Console
from rcot_rl.recipe.loader import load_recipe

STAGE = "grpo-aks"

# a companion with a daemon in another session, such as wandb-core; it ends with its input
WITH_DAEMON = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True, stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
sys.stdin.read()
"""

TRACKER = """
import os, pathlib, time
from rcot_rl.monitoring.trackers.tracker import Tracker

class Own(Tracker):
    label = "own"
    def open(self, stage):
        self.file = stage.run / "lines" / stage.stage
        self.file.parent.mkdir(exist_ok=True)
        return len(self.file.read_text().split()) if self.file.exists() else 0
    def log(self, step, values):
        BODY
        with self.file.open("a") as file:
            file.write(f"{step}\\n")
    def summarize(self, values): pass
    def alert(self, alert): pass
    def close(self, state): pass
    def where(self): return f"see {self.file.parent.name}"
"""


def until(condition: Callable[[], bool], within: float = 20.0) -> None:
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.05)


def test_a_companion_and_its_daemon_outlive_stages_and_end_with_the_host(tmp_path, living):
    log = tmp_path / "companion.log"
    with Host({}) as host:
        companion = host.start_companion(["-c", WITH_DAEMON], log, {})
        until(lambda: log.is_file() and bool(log.read_text().strip()))
        daemon = int(log.read_text())
        host.run(["-c", "print('stage')"], tmp_path / "one.log")
        with pytest.raises(StageFailed):
            host.run(["-c", "raise SystemExit(3)"], tmp_path / "two.log")
        assert companion.status is None and psutil.pid_exists(daemon)
        command = keeper.descendants(companion.pid)
    assert not living([companion.pid, daemon, *command], within=10)


def test_the_memory_of_a_companion_is_not_a_stages(tmp_path):
    grow = "data = b'x' * 300_000_000\nprint('grown', flush=True)\ninput()"
    with Host({}) as host:
        before = host.memory.peak_bytes()
        log = tmp_path / "companion.log"
        host.start_companion(["-c", grow], log, {})
        until(lambda: "grown" in log.read_text())
        assert host.memory.peak_bytes() < before + 100_000_000


def test_a_companion_does_not_hold_the_runs_lock(tmp_path):
    with open(tmp_path / "lock", "w") as lock, Host({}, held=(lock.fileno(),)) as host:
        companion = host.start_companion(["-c", "input()"], tmp_path / "log", {})
        until(lambda: bool(keeper.descendants(companion.pid)))
        for pid in (companion.pid, *keeper.descendants(companion.pid)):
            files = [os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir()]
            assert str(tmp_path / "lock") not in files


class ShownConsole(Console):
    """Keeps the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    """Return a function that starts tracking a run of four steps by a tracker with this body."""
    monkeypatch.setattr(run_tracking, "POLL_S", 0.05)
    monkeypatch.setattr(run_tracking, "FIRST_RESTART_S", 0.1)
    run = tmp_path / "run"
    (run / STAGE / "attempt-1").mkdir(parents=True)
    rows = [{"step": s, "time": s, "reward/mean": 1.0} for s in range(1, 5)]
    (run / STAGE / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def make(body: str = "pass", drain_s: float = 20.0) -> SimpleNamespace:
        source = tmp_path / "own.py"
        source.write_text(TRACKER.replace("BODY", body))
        words = ["wandb.mode=disabled", f"tracking.others=['{source}:Own']"]
        recipe = load_recipe("laptop", [*words, f"tracking.drain_s={drain_s}"])
        (run / "recipe.yaml").write_text(yaml.safe_dump({"recipe": recipe.model_dump(mode="json")}))
        console, places = ShownConsole(), {}
        host = Host({})
        tracking = RunTracking(recipe, run, host, console, places.__setitem__)
        sent = run / "lines" / STAGE
        return SimpleNamespace(
            run=run,
            host=host,
            tracking=tracking,
            console=console,
            places=places,
            steps=lambda: sent.read_text().split() if sent.is_file() else [],
        )

    return make


def test_the_end_of_a_command_waits_for_the_rest_and_says_so(tracked):
    case = tracked()
    with case.host, case.tracking:
        pass
    assert case.steps() == ["1", "2", "3", "4"]
    assert case.console.lines[-1] == "own: 4 of 4 steps sent"
    assert case.places == {"own": "see lines"}
    assert case.console.lines.count("own: `see lines` shows this run") == 1


def test_a_tracker_that_never_answers_holds_the_command_for_drain_s_only(tracked):
    case = tracked("time.sleep(600) if step == 3 else None", drain_s=4.0)
    with case.host:
        with case.tracking:
            until(lambda: case.steps() == ["1", "2"])
            began = time.monotonic()
        assert time.monotonic() - began < 10
    assert case.console.lines[-1].startswith("own: 2 of 4 steps sent")
    assert case.console.lines[-1].endswith("run again, sends the rest")


def test_a_finished_run_is_sent_to_its_end_by_the_next_command(tracked):
    case = tracked("time.sleep(600) if step == 3 and MARK.exists() else None", drain_s=4.0)
    source = case.run.parent / "own.py"
    mark = case.run.parent / "hangs"
    mark.touch()
    source.write_text(f"import pathlib\nMARK = pathlib.Path({str(mark)!r})\n{source.read_text()}")
    with case.host, case.tracking:
        until(lambda: case.steps() == ["1", "2"])
    assert len(case.steps()) == 2
    mark.unlink()
    recipe = RunReader(case.run).recipe
    console = ShownConsole()
    send_rest(recipe, case.run, console)
    assert case.steps() == ["1", "2", "3", "4"]
    assert console.lines[-1] == "own: 4 of 4 steps sent"
    send_rest(recipe, case.run, again := ShownConsole())
    assert again.lines == []


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small disk")
def test_a_full_disk_of_the_trackers_sends_nothing_until_there_is_room(tracked):
    case = tracked(drain_s=60.0)
    disk = case.run / "tracking"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]).returncode:
        pytest.skip("cannot mount")
    try:
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        with case.host, case.tracking:
            case.host.run(["-c", "print('trained')"], case.run / "log.txt")
            time.sleep(3)
            assert "trained" in (case.run / "log.txt").read_text()
            assert case.steps() == []
            filler.unlink()
        assert case.steps() == ["1", "2", "3", "4"]
        assert case.console.lines[-1].startswith("own: 4 of 4 steps sent")
    finally:
        subprocess.run(["umount", "-l", str(disk)])


def test_a_killed_follower_is_started_again_and_sends_the_rest_once(tracked):
    case = tracked("step == 3 and not MARK.exists() and (MARK.touch(), os.kill(os.getpid(), 9))")
    source = case.run.parent / "own.py"
    mark = case.run.parent / "killed"
    source.write_text(f"import pathlib\nMARK = pathlib.Path({str(mark)!r})\n{source.read_text()}")
    with case.host, case.tracking:
        end = time.monotonic() + 20
        while len(case.steps()) < 4 and time.monotonic() < end:
            case.tracking.poll()
            time.sleep(0.05)
    assert mark.exists() and case.steps() == ["1", "2", "3", "4"]
    warnings = [text for text in case.console.lines if "SIGKILL" in text]
    assert len(warnings) == 1 and "the run continues" in warnings[0]
    assert case.console.lines[-1] == "own: 4 of 4 steps sent"


def test_a_tracker_that_always_fails_is_one_warning_and_one_last_line(tracked):
    case = tracked("raise ConnectionError('refused')")
    with case.host, case.tracking:
        end = time.monotonic() + 20
        while not any("refused" in text for text in case.console.lines):
            assert time.monotonic() < end
            case.tracking.poll()
            time.sleep(0.05)
    lines = [text for text in case.console.lines if "refused" in text]
    assert len(lines) == 2
    assert lines[0].startswith("Own: refused; the run continues")
    assert lines[1].startswith("own: 0 of 4 steps sent (refused)")


def test_an_unwritable_folder_of_trackers_fails_nothing(tracked):
    case = tracked(drain_s=3.0)
    (case.run / "tracking").write_text("a file where a folder should be")
    with case.host, case.tracking:
        case.host.run(["-c", "print('trained')"], case.run / "log.txt")
        case.tracking.poll()
    assert "trained" in (case.run / "log.txt").read_text()
    assert case.console.lines[-1].startswith("Own: 0 of 4 steps sent")
    assert case.steps() == []


def test_an_interrupted_command_waits_little(tracked, monkeypatch):
    monkeypatch.setattr(run_tracking, "INTERRUPTED_S", 0.5)
    case = tracked("time.sleep(600)", drain_s=60)
    with pytest.raises(KeyboardInterrupt), case.host:
        began = time.monotonic()
        with case.tracking:
            raise KeyboardInterrupt
    assert time.monotonic() - began < 15


def test_no_follower_survives_a_killed_command(tmp_path, tracked, living):
    case = tracked()
    script = tmp_path / "command.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from cluster.supervise.processes import Host\n"
        "from cluster.supervise.run_tracking import RunTracking\n"
        "from rcot_rl.monitoring.run_files.run_reader import RunReader\n"
        "from rcot_rl.monitoring.terminal.console import Console\n"
        "run = Path(sys.argv[1])\n"
        "with Host({}) as host, RunTracking(RunReader(run).recipe, run, host, Console()):\n"
        "    time.sleep(600)\n"
    )
    command = subprocess.Popen([sys.executable, str(script), str(case.run)])
    until(lambda: len(case.steps()) == 4)
    below = [p.pid for p in psutil.Process(command.pid).children(recursive=True)]
    assert len(below) == 2, "the keeper and the follower"
    command.send_signal(signal.SIGKILL)
    command.wait()
    assert not living(below, within=10)
