"""A stage is retried after failures that may pass, and waits for disk space, inodes and quota."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.supervise import retries
from cluster.supervise.processes import StageFailed
from cluster.supervise.retries import run_with_retries
from cluster.supervise.verdict import FailureHistory
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.recipe.supervise_section import SuperviseSection
from rcot_rl.runfolder import RunFolder

SHORTAGES = {
    "space": (errno.ENOSPC, {"free": 1000}),
    "inodes": (errno.ENOSPC, {"inodes": 3}),
    "quota": (errno.EDQUOT, {"fault": errno.EDQUOT}),
}
BY = ["supervisor", "child"]


class FakeConsole:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, what: str, done: int, total: int) -> None:
        self.lines.append(f"{what} {done}/{total}")


class FakeStage:
    """A stage in RUN/sft whose attempts fail as listed, and then succeed."""

    def __init__(self, run: Path, *failures: Callable[[Path], None], **supervise: object) -> None:
        self.folder = run / "sft"
        self.failures = list(failures)
        self.section = SuperviseSection(**supervise)
        self.console = FakeConsole()
        self.starts = self.step = 0

    def attempt(self) -> str:
        self.starts += 1
        log = self.folder / f"attempt-{self.starts}" / "log.txt"
        log.parent.mkdir(parents=True)
        log.write_text(f"Error: fault {'abc'[self.starts - 1]}\n")
        if self.failures:
            self.failures.pop(0)(log)
        return "result"

    def run(self) -> str:
        return run_with_retries(
            self.attempt,
            FailureHistory(self.folder, self.section),
            self.console,
            newest_step=lambda: self.step,
            reason=Path.read_text,
        )

    def causes(self) -> list[str]:
        rows = (self.folder / "attempts.jsonl").read_text().splitlines()
        return [json.loads(row)["cause"] for row in rows]


def ends(status: int) -> Callable[[Path], None]:
    def fail(log: Path) -> None:
        raise StageFailed(f"ended with status {status}", log)

    return fail


def cannot_write(number: int, by: str, meanwhile: Callable[[], None]) -> Callable[[Path], None]:
    """Return a failure to write metrics.jsonl, of the supervisor or of a child that logs it."""

    def fail(log: Path) -> None:
        error = OSError(number, os.strerror(number), str(log.parents[1] / "metrics.jsonl"))
        log.write_text(f"OSError: {error}\n")
        meanwhile()
        if by == "supervisor":
            raise error
        raise StageFailed("ended with status 1", log)

    return fail


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list to which each sleep adds its seconds; it takes no time."""
    durations: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", durations.append)
    return durations


def test_success_is_returned_and_leaves_no_history(tmp_path, sleeps):
    stage = FakeStage(tmp_path)
    assert stage.run() == "result"
    assert (stage.starts, sleeps) == (1, []) and not (stage.folder / "attempts.jsonl").exists()


def test_a_failure_is_retried_after_the_backoff(tmp_path, sleeps):
    stage = FakeStage(tmp_path, ends(1), ends(-9), backoff_s=3)
    assert stage.run() == "result"
    assert stage.starts == 3 and sleeps == [3, 6]
    assert stage.causes() == ["error", "signal"]
    assert [line.splitlines()[0] for line in stage.console.lines] == [
        "sft attempt-1 ended with status 1 after step 0.",
        "sft attempt-2 ended with status -9 after step 0.",
    ]


def test_a_repeated_failure_is_raised_with_its_verdict_and_log(tmp_path, sleeps):
    def fail(log: Path) -> None:
        log.write_text("Error: the same\n")
        raise StageFailed("ended with status 1", log)

    stage = FakeStage(tmp_path, fail, fail)
    with pytest.raises(StageFailed, match="same step with the same error") as caught:
        stage.run()
    assert caught.value.log == stage.folder / "attempt-2" / "log.txt"
    assert stage.starts == 2 and len(sleeps) == 1


def test_the_same_error_at_a_later_step_is_retried(tmp_path, sleeps):
    stage = FakeStage(tmp_path)

    def fail_later(log: Path) -> None:
        log.write_text("Error: the same\n")
        stage.step += 1
        raise StageFailed("ended with status 1", log)

    stage.failures = [fail_later, fail_later]
    assert stage.run() == "result"


def test_retries_end_at_max_attempts(tmp_path, sleeps):
    stage = FakeStage(tmp_path, ends(1), ends(1), ends(1), max_attempts=2)
    with pytest.raises(StageFailed, match="start 2 of 2"):
        stage.run()
    assert stage.starts == 2


def test_input_at_fault_is_raised_at_once(tmp_path, sleeps):
    stage = FakeStage(tmp_path, ends(2))
    with pytest.raises(InputError, match="fault a"):
        stage.run()
    assert (stage.starts, sleeps) == (1, [])


def test_an_input_error_of_the_supervisor_passes(tmp_path, sleeps):
    def refuse(log: Path) -> None:
        raise InputError("is missing", key="models.policy")

    stage = FakeStage(tmp_path, refuse)
    with pytest.raises(InputError, match=r"models\.policy: is missing"):
        stage.run()
    assert not (stage.folder / "attempts.jsonl").exists()


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("kind", SHORTAGES)
def test_a_shortage_is_waited_for(tmp_path, set_disk, monkeypatch, kind, by):
    number, state = SHORTAGES[kind]
    stage = FakeStage(tmp_path, cannot_write(number, by, lambda: set_disk(**state)))
    durations: list[float] = []

    def sleep(seconds: float) -> None:
        durations.append(seconds)
        if len(durations) == 4:
            set_disk()  # there is room again

    monkeypatch.setattr(retries.time, "sleep", sleep)
    assert stage.run() == "result"
    assert stage.starts == 2 and durations == [1, 1, 1, 1, stage.section.backoff_s]
    verdict = json.loads((stage.folder / "attempt-1/verdict.json").read_text())
    assert verdict["cause"] == "disk" and str(tmp_path) in verdict["text"]
    assert any("waiting" in line for line in stage.console.lines)


@pytest.mark.parametrize("by", BY)
def test_a_read_only_run_is_not_waited_for(tmp_path, set_disk, sleeps, by):
    stage = FakeStage(tmp_path, cannot_write(errno.EROFS, by, lambda: set_disk(read_only=True)))
    with pytest.raises(StageFailed, match="mounted read-only"):
        stage.run()
    assert (stage.starts, sleeps) == (1, [])


def test_waiting_ends_if_the_run_becomes_read_only(tmp_path, set_disk, monkeypatch):
    stage = FakeStage(tmp_path, cannot_write(errno.ENOSPC, "child", lambda: set_disk(free=1000)))
    monkeypatch.setattr(retries.time, "sleep", lambda _: set_disk(read_only=True))
    with pytest.raises(StageFailed, match="Since then: It is mounted read-only"):
        stage.run()
    assert stage.starts == 1


def test_waiting_ends_after_disk_wait_minutes(tmp_path, set_disk, monkeypatch, sleeps):
    number, state = SHORTAGES["quota"]
    stage = FakeStage(tmp_path, cannot_write(number, "child", lambda: set_disk(**state)))
    clock = iter(range(0, 10**6, 600))
    monkeypatch.setattr(retries.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(StageFailed, match="60 minutes later: The quota there is used up"):
        stage.run()
    assert stage.starts == 1


def test_other_errors_of_the_supervisor_pass(tmp_path, sleeps):
    stage = FakeStage(tmp_path, cannot_write(errno.EIO, "supervisor", lambda: None))
    with pytest.raises(OSError, match="Input/output"):
        stage.run()
    assert (stage.starts, sleeps) == (1, [])


def test_a_run_on_a_read_only_file_system_is_refused_in_one_line(tmp_path, monkeypatch):
    folder = RunFolder.claim(tmp_path / "run", load_recipe("laptop"))

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="mounted read-only") as caught, folder.locked():
        pass
    assert caught.value.file == str(folder.root / ".lock")
