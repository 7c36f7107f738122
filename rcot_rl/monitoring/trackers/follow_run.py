"""Send a run folder to one tracker, in a process of its own.

    python -m rcot_rl.monitoring.trackers.follow_run RUN TRACKER [--once]

TRACKER is `wandb`, `wandb-offline`, `tensorboard` or `FILE.py:CLASS`. The run folder is the queue:
the follower reads it, sends what is new, and keeps in RUN/tracking/<tracker>.json how far it came.
Every failure of a tracker is retried with back-off. Each tracker has a process, so that one which
blocks, crashes or leaks memory affects no other. A call that does not return ends the process
(SIGALRM), and the command starts another one, which resumes.

The process ends with the command (cluster/supervise/keeper.py), or once it has sent everything
after its standard input was closed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil

from rcot_rl.errors import InputError
from rcot_rl.monitoring.judgement.alert import Alert
from rcot_rl.monitoring.run_files.run_reader import RunReader, StageView
from rcot_rl.monitoring.run_files.step_tail import StepTail
from rcot_rl.monitoring.trackers.stage_contents import AlertKey, StageContents, digest
from rcot_rl.monitoring.trackers.tracked_stage import tracked_stage
from rcot_rl.monitoring.trackers.tracker import Tracker, Value
from rcot_rl.monitoring.trackers.tracker_choice import make_tracker, name_of
from rcot_rl.monitoring.trackers.tracker_state import (
    SentStage,
    TrackerState,
    read_state,
    write_state,
)
from rcot_rl.recipe.tracking_section import TRACKING
from rcot_rl.system import machine
from rcot_rl.system.logs import configure_logging

logger = logging.getLogger(__name__)

POLL_S = 2.0
FIRST_RETRY_S, LAST_RETRY_S = 5.0, 300.0
ENDING_TRIES, ENDING_RETRY_S = 3, 2.0
"""Tries of a tracker that fails, and the pause between them, once the command has ended."""
CALL_S = 300.0
"""Seconds that a call may take before the process is ended."""
UPLOAD_S = 1800.0
"""The same for `artifact` and `close`, which wait for uploads."""
LOG_BYTES = 4 * 2**20
"""Size at which the follower's log is emptied."""

_Result = TypeVar("_Result")
Limit = Callable[[float], contextlib.AbstractContextManager[None]]
"""Ends the process if the body takes longer than a number of seconds."""


def follow(
    reader: RunReader,
    tracker: Tracker,
    name: str,
    stop: threading.Event,
    *,
    once: bool = False,
    limit: Limit = lambda seconds: contextlib.nullcontext(),
    opened: Callable[[], None] = lambda: None,
    poll_s: float = POLL_S,
    retry_s: float = FIRST_RETRY_S,
) -> TrackerState:
    """Send a run folder to a tracker until `stop` is set and everything was sent.

    Args:
        reader: The run folder.
        tracker: Receives the run.
        name: Name of the tracker's files in RUN/tracking.
        stop: Set once the command has ended; what is left is sent, then the function returns. A
            tracker that keeps failing is given up after ENDING_TRIES.
        once: As if `stop` were set from the start.
        limit: Limits the time of each call.
        opened: Called after each attempt to open the tracker.
        poll_s: Seconds between two looks at the folder.
        retry_s: Seconds until the first retry; each further one waits twice as long, up to
            LAST_RETRY_S.

    Returns:
        What was sent.
    """
    feed = TrackerFeed(reader, tracker, name, limit, opened)
    pause, tries = retry_s, 0
    while True:
        ending = once or stop.is_set()
        try:
            feed.send_new(live=not ending)
            pause, tries = retry_s, 0
            if ending:
                return feed.state
            stop.wait(poll_s)
        except (Exception, SystemExit) as error:  # whatever a tracker raises
            feed.failed(error)
            tries += 1 if ending else 0
            if tries >= ENDING_TRIES:
                return feed.state
            if ending:
                time.sleep(min(ENDING_RETRY_S, pause))
            else:
                stop.wait(pause)
            pause = min(2 * pause, LAST_RETRY_S)
        _bound_log()


class TrackerFeed:
    """Calls a tracker with what it has not received yet.

    The state is written before a stage is opened: without room for it nothing is sent, so that
    nothing is sent twice later.
    """

    def __init__(
        self,
        reader: RunReader,
        tracker: Tracker,
        name: str,
        limit: Limit,
        opened: Callable[[], None] = lambda: None,
    ) -> None:
        self.reader = reader
        self.tracker = tracker
        self.name = name
        self.state = read_state(reader.root, name)
        self.state.label = tracker.label
        self._limit = limit
        self._opened = opened
        self._open: StageContents | None = None
        """The stage for which the tracker is open."""

        self._recipe_time = 0

    def send_new(self, live: bool) -> None:
        """Send all new steps, results, alerts and artifacts, in the order of the stages.

        Args:
            live: True while the command runs. The tracker then stays open for the stage that runs.

        Raises:
            Exception: The tracker's, or an OSError of RUN/tracking.
        """
        self._read_recipe_again()
        views = [v for v in self.reader.stages() if v.attempts or v.state == "done"]
        running = self._running_stage(views) if live else None
        if self._open is not None:  # its calls are in progress, so it comes first
            views.sort(key=lambda view: view.name != self._open_name)
        for view in views:
            self._send_stage(view, running=view.name == running and view.state != "done")
            if self._open is not None:
                return

    def failed(self, error: BaseException) -> None:
        """Count a failure, and close the tracker."""
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        logger.warning("%s: %s: %s", self.name, type(error).__name__, text, exc_info=error)
        self.state.errors += 1
        self.state.error = text[:300]
        if self._open is not None:
            self._open = None
            with contextlib.suppress(Exception, SystemExit):
                self._call(UPLOAD_S, self.tracker.close, "running")
        with contextlib.suppress(OSError):
            self._save()

    @property
    def _open_name(self) -> str | None:
        return None if self._open is None else self._open.view.name

    def _send_stage(self, view: StageView, running: bool) -> None:
        """Send what is new of a stage; close the tracker unless the stage runs."""
        sent = self.state.stage(view.name)
        final = "running" if running else _final_state(view)
        stamp = _stamp(self.reader.root, view, steps=not running)
        if self._open is None:
            if not self._has_news(view, sent, running, final, stamp):
                return
            self._open_stage(view, sent)
        contents = self._open
        assert contents is not None
        contents.view = view
        self._send_steps(contents, sent)
        if not running:
            self._send_results(contents, sent)
        if not running or sent.stamp != stamp:
            self._send_alerts(contents.alerts_at(None), sent)
            self._send_summary(contents, sent, with_artifacts=not running)
            sent.stamp = stamp
        if not running:
            self._call(UPLOAD_S, self.tracker.close, final)
            self._open = None
            sent.arrived, sent.closed = sent.steps, final
        if not running or self.state.error:
            self.state.error = ""
            self._save()

    def _has_news(
        self, view: StageView, sent: SentStage, running: bool, final: str, stamp: str
    ) -> bool:
        """Return True if a stage for which the tracker is not open has something to send."""
        if running:
            return bool(view.failures or sent.steps) or _has_steps(view)
        if sent.stamp == stamp and sent.closed == final:
            return False
        lines = StepTail(view.folder / "metrics.jsonl").new_lines()
        if sent.closed != final or any(line["step"] > sent.last_step for line in lines):
            return True
        contents = StageContents(self.reader, view)
        new_alerts = any(key not in sent.alerts for key, _ in contents.all_alerts())
        if new_alerts or digest([contents.summary(), contents.artifacts()]) != sent.results:
            return True
        sent.stamp = stamp  # files were written again with the same content
        self._save()
        return False

    def _open_stage(self, view: StageView, sent: SentStage) -> None:
        """Open the tracker, and adopt what it already has."""
        self._save()
        try:
            last = self._call(CALL_S, self.tracker.open, tracked_stage(self.reader, view))
        finally:
            self._opened()
        self._open = StageContents(self.reader, view)
        self.state.where = self._call(CALL_S, self.tracker.where) or self.state.where
        if last == 0 and sent.last_step > 0:  # the tracker writes the stage again
            sent.alerts, sent.results = [], ""
        if last != sent.last_step:
            lines = StepTail(view.folder / "metrics.jsonl").new_lines()
            sent.steps = sum(line["step"] <= last for line in lines) or int(last > 0)
            sent.last_step = last
        sent.arrived, sent.closed, sent.stamp = min(sent.arrived, sent.steps), "", ""
        self._save()

    def _send_steps(self, contents: StageContents, sent: SentStage) -> None:
        """Send each new step once: steps that a resumed attempt repeats are not sent again."""
        for line in contents.new_lines():
            if line["step"] > sent.last_step:
                self._log(line["step"], contents.values(line), sent)
                sent.faults = contents.faults
            self._send_alerts(contents.alerts_at(line), sent)

    def _send_results(self, contents: StageContents, sent: SentStage) -> None:
        """Send the results of a stage without steps as its only step."""
        if sent.last_step == 0 and (values := contents.results()):
            self._log(1, values, sent)

    def _send_summary(self, contents: StageContents, sent: SentStage, with_artifacts: bool) -> None:
        summary = contents.summary()
        artifacts = contents.artifacts() if with_artifacts else []
        results = digest([summary, artifacts])
        if results == sent.results:
            return
        if summary:
            self._call(CALL_S, self.tracker.summarize, summary)
        for artifact in artifacts:
            self._call(UPLOAD_S, self.tracker.artifact, artifact)
        sent.results = results

    def _log(self, step: int, values: Mapping[str, Value], sent: SentStage) -> None:
        self._call(CALL_S, self.tracker.log, step, values)
        sent.last_step, sent.steps = step, sent.steps + 1
        self._save()

    def _send_alerts(self, alerts: Sequence[tuple[AlertKey, Alert]], sent: SentStage) -> None:
        for key, alert in alerts:
            if key not in sent.alerts:
                self._call(CALL_S, self.tracker.alert, alert)
                sent.alerts.append(key)
                self._save()

    def _call(self, seconds: float, call: Callable[..., _Result], *arguments: Any) -> _Result:
        with self._limit(seconds):
            return call(*arguments)

    def _save(self) -> None:
        write_state(self.reader.root, self.name, self.state)

    def _read_recipe_again(self) -> None:
        """Read RUN/recipe.yaml again if it changed: stages add hashes to it."""
        with contextlib.suppress(OSError):
            changed = (self.reader.root / "recipe.yaml").stat().st_mtime_ns
            if changed != self._recipe_time:
                self.reader, self._recipe_time = RunReader(self.reader.root), changed

    def _running_stage(self, views: Sequence[StageView]) -> str | None:
        """Return the stage that runs: the status', or the one with the newest attempt."""
        status = self.reader.status
        if status is not None and status.is_running:
            return status.stage
        started = {a.stat().st_mtime: v.name for v in views for a in v.folder.glob("attempt-*")}
        return started[max(started)] if started else None


def _final_state(view: StageView) -> Literal["running", "done", "failed"]:
    """Return the state of a stage that does not run in this command."""
    if view.state == "done":
        return "done"
    newest = f"attempt-{view.attempts}"
    return "failed" if any(row.get("attempt") == newest for row in view.failures) else "running"


def _has_steps(view: StageView) -> bool:
    try:
        return (view.folder / "metrics.jsonl").stat().st_size > 0
    except OSError:
        return False


def _stamp(run: Path, view: StageView, steps: bool) -> str:
    """Return sizes and times of the files that a stage's results depend on.

    Args:
        steps: Include its steps.
    """
    files = [view.folder / "done.json", view.folder / "attempts.jsonl"]
    files += [
        run / "recipe.yaml",
        run / "predict" / "rewards.json",
        *sorted(run.glob("eval/*.json")),
    ]
    files += [view.folder / "metrics.jsonl"] if steps else []
    facts = []
    for file in files:
        with contextlib.suppress(OSError):
            stat = file.stat()
            facts.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _lower_priority() -> None:
    """Give this process and its children the lowest share of the CPUs and of the disk.

    SCHED_IDLE is not used: on busy CPUs it leaves a process 0.3 % of one, which is not enough to
    keep up; niceness 19 leaves it 1.5 %.
    """
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        machine.set_niceness(process.pid, 19)
        with contextlib.suppress(psutil.Error, OSError):
            process.ionice(psutil.IOPRIO_CLASS_IDLE)


def _bound_log() -> None:
    """Empty the log of this process, its standard error, if it has become large."""
    with contextlib.suppress(OSError):
        if _is_own_log() and os.fstat(2).st_size > LOG_BYTES:
            os.ftruncate(2, 0)
            logger.warning("the log reached %d MiB and was emptied", LOG_BYTES >> 20)


def _is_own_log() -> bool:
    return Path(os.readlink("/proc/self/fd/2")).parent.name == TRACKING


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """End this process if the body takes longer, also if it never runs Python code again."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _hold_tracker(run: Path, name: str, stop: threading.Event, once: bool) -> int:
    """Lock a tracker's files against another command's follower; return the descriptor.

    Raises:
        InputError: Another command holds the lock, and `once` is set.
    """
    path = run / TRACKING / f"{name}.lock"
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            busy = isinstance(error, BlockingIOError)
            text = "another command sends this run" if busy else str(error.strerror)
            if once or stop.is_set():
                raise InputError(text, file=path) from error
            logger.warning("%s: %s", path, text)
        stop.wait(FIRST_RETRY_S)


def main() -> int:
    """Run the process. Returns the exit status: 0 if everything was sent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("tracker")
    parser.add_argument("--once", action="store_true")
    arguments = parser.parse_args()
    configure_logging(logging.WARNING)
    stop = threading.Event()
    if not arguments.once:
        threading.Thread(target=_await_end, args=(stop,), daemon=True).start()
    reader = RunReader(arguments.run)
    name = name_of(arguments.tracker)
    try:
        _hold_tracker(arguments.run, name, stop, arguments.once)
        tracker = make_tracker(arguments.tracker, reader)
    except InputError as error:
        logger.error("%s", error)
        return 2

    def opened() -> None:
        """Leave the CPUs to the training, once the tracker's packages are imported."""
        if not (arguments.once or stop.is_set()):
            _lower_priority()

    state = follow(reader, tracker, name, stop, once=arguments.once, limit=_alarm, opened=opened)
    return 1 if state.error else 0


def _await_end(stop: threading.Event) -> None:
    """Set `stop` once the command has closed this process' standard input."""
    while os.read(0, 4096):
        pass
    stop.set()


if __name__ == "__main__":
    # a tracker's threads must not keep the process
    status = main()
    sys.stderr.flush()
    os._exit(status)
