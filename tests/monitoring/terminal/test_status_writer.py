"""RUN/status.json tells what a command is at, and never ends it."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from rcot_rl.errors import InputError
from rcot_rl.monitoring.run_files import run_status
from rcot_rl.monitoring.run_files.run_status import RunStatus, read_status
from rcot_rl.monitoring.terminal import status_writer
from rcot_rl.monitoring.terminal.console import Console
from rcot_rl.monitoring.terminal.status_writer import StatusWriter


def status_of(run: Path) -> RunStatus:
    status = read_status(run)
    assert status is not None
    return status


def wait_for(run: Path, **values: object) -> RunStatus:
    """Return the status once it has the values; fail after three seconds."""
    deadline = time.monotonic() + 3
    while any(getattr(status_of(run), key) != value for key, value in values.items()):
        assert time.monotonic() < deadline, status_of(run)
        time.sleep(0.02)
    return status_of(run)


def test_the_console_reports_stage_step_rate_and_work(tmp_path: Path) -> None:
    console = Console(["data", "grpo-ktg"])
    console.status = StatusWriter(tmp_path, ["data", "grpo-ktg"])
    with console.status:
        assert status_of(tmp_path).is_running and status_of(tmp_path).pid == os.getpid()
        console.stage("data")
        console.progress("expressions", 3, 9)
        status = wait_for(tmp_path, stage="data", work="expressions", work_done=3, work_total=9)
        assert status.work_started == pytest.approx(time.time(), abs=5)
        console.stage("grpo-ktg")
        for step in (1, 2, 3):
            console.step("grpo-ktg", {"step": step, "time": 10.0 * step}, 48)
        console.status.track("wandb", "https://example.org/group")
        status = wait_for(tmp_path, stage="grpo-ktg", step=3, total_steps=48, work="")
        assert status.seconds_per_step == 10
        console.line("a verdict\nof two lines")
        wait_for(tmp_path, message="a verdict of two lines")
    assert (status_of(tmp_path).state, status_of(tmp_path).is_running) == ("done", False)
    assert status_of(tmp_path).tracking == {"wandb": "https://example.org/group"}


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (InputError("too short", key="data"), "failed", "data: too short"),
        (KeyboardInterrupt(), "interrupted", "interrupted"),
        (RuntimeError(), "failed", "RuntimeError"),
    ],
)
def test_the_last_state_tells_how_the_command_ended(
    tmp_path: Path, error: BaseException, state: str, message: str
) -> None:
    with pytest.raises(type(error)), StatusWriter(tmp_path, ["data"]):
        raise error
    assert (status_of(tmp_path).state, status_of(tmp_path).message) == (state, message)


def test_a_silent_stage_is_refreshed_and_a_busy_one_written_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []
    monkeypatch.setattr(status_writer, "REFRESH_S", 0.2)
    monkeypatch.setattr(status_writer, "LEAST_S", 0.05)
    monkeypatch.setattr(status_writer, "write_status", lambda run, status: writes.append(status))
    with StatusWriter(tmp_path, ["data"]) as status:
        time.sleep(0.8)
        silent = len(writes)
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            status.update(step=1)
    assert 3 <= silent <= 9 and len(writes) - silent <= 12


def test_a_full_disk_does_not_end_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_status, "write_text", full)
    with StatusWriter(tmp_path, ["data"]) as status:
        status.update(step=7)
        time.sleep(0.1)
    assert not (tmp_path / "status.json").exists()
    monkeypatch.undo()
    with StatusWriter(tmp_path, ["data"]):
        pass
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
