"""Run a stage, and retry it after failures that may pass.

Failures are judged by `cluster.supervise.verdict`. A stage that ran out of disk space, inodes or
quota restarts once there is room for a checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from cluster.supervise.processes import StageFailed
from cluster.supervise.verdict import FailureHistory, FailureVerdict
from rcot_rl.errors import InputError
from rcot_rl.monitoring.terminal.console import Console
from rcot_rl.runfolder import attempts_in
from rcot_rl.system import disk
from rcot_rl.training.checkpoint_store import room_needed

_Result = TypeVar("_Result")


def run_with_retries(
    attempt: Callable[[], _Result],
    history: FailureHistory,
    console: Console,
    *,
    newest_step: Callable[[], int],
    reason: Callable[[Path], str],
) -> _Result:
    """Call `attempt` until it succeeds, as often as the recipe's `supervise` section allows.

    Args:
        attempt: Runs the stage in a new attempt folder, from its newest checkpoint.
        history: Earlier failures of the stage; failures of this call are added.
        newest_step: Returns the number of optimizer steps done so far.
        reason: Returns the last error in an attempt's log.

    Raises:
        InputError: An attempt found the input or the configuration at fault.
        StageFailed: An attempt failed and is not retried; the message is the verdict.
    """
    while True:
        try:
            with shortage_is_failure(history.stage):
                return attempt()
        except StageFailed as error:
            cause = error.__cause__
            text = str(cause) if isinstance(cause, OSError) else reason(error.log)
            verdict = history.judge(str(error), error.log, newest_step(), text)
            if verdict.cause == "input":
                raise InputError(verdict.text) from error
            if not verdict.retry:
                raise StageFailed(verdict.text, error.log) from error
            console.line("\n".join(verdict.sentences))
            if verdict.cause == "disk":
                _wait_for_space(verdict, error.log, history, console)
            time.sleep(history.backoff_s())


@contextlib.contextmanager
def shortage_is_failure(stage: Path) -> Iterator[None]:
    """Raise StageFailed if this process cannot write because of the disk.

    The same shortage in a child process ends in StageFailed too. Other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in disk.KINDS:
            raise
        attempt = [stage / "attempt-1", *attempts_in(stage)][-1]
        raise StageFailed("was stopped: a file cannot be written", attempt / "log.txt") from error


def _wait_for_space(
    verdict: FailureVerdict, log: Path, history: FailureHistory, console: Console
) -> None:
    """Wait until a checkpoint fits into `verdict.place`. Raises StageFailed."""
    stage, minutes = history.stage, history.section.disk_wait_minutes
    place, needed = Path(verdict.place), room_needed(stage / "checkpoints")
    deadline, announced = time.monotonic() + 60 * minutes, False
    while (lack := disk.shortage(place, needed, disk.LEAST_FREE)) is not None:
        if not lack.passes:
            raise StageFailed(f"{verdict.text} Since then: {lack.text}", log)
        if time.monotonic() > deadline:
            raise StageFailed(f"{verdict.text} {minutes:g} minutes later: {lack.text}", log)
        if lack.kind == "space":
            free = shutil.disk_usage(place).free
            console.progress(f"{stage.name}: waiting for space, MiB", free >> 20, needed >> 20)
        elif not announced:
            console.line(f"{stage.name}: waiting. {lack.text}")
            announced = True
        time.sleep(1)
