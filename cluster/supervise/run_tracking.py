"""The followers of a command: started, restarted, announced, and ended within `tracking.drain_s`.

Nothing here fails a stage: what goes wrong is one line on the console.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.supervise.companion import Companion
from cluster.supervise.processes import Host
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.terminal.console import Console
from rcot_rl.monitoring.trackers.tracked_stage import run_id_of
from rcot_rl.monitoring.trackers.tracker_choice import TENSORBOARD, WANDB, choices, name_of
from rcot_rl.monitoring.trackers.tracker_state import delivery_of, read_state
from rcot_rl.recipe.schema import Recipe
from rcot_rl.recipe.tracking_section import TRACKING
from rcot_rl.system.disk import shortage

logger = logging.getLogger(__name__)

MODULE = "rcot_rl.monitoring.trackers.follow_run"
POLL_S = 1.0
RESTARTS = 5
"""Restarts of a follower in one command."""
FIRST_RESTART_S, LAST_RESTART_S = 5.0, 300.0
_LOCAL = (WANDB["offline"], TENSORBOARD)
"""Trackers that only write files."""
INTERRUPTED_S = 5.0
"""Longest wait for followers after Ctrl-C."""
_ENVIRONMENT = {
    # trackers send little, and must not use the CPUs of the training
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GOMAXPROCS": "1",
}


@dataclass
class _Followed:
    """A tracker of the run and its follower's process."""

    choice: str
    name: str
    process: Companion
    restarts: int = 0
    restart_at: float | None = None
    where: str = ""
    warned: bool = False


class RunTracking:
    """A context in which followers send the run folder to the recipe's trackers.

    Args:
        recipe: Its `wandb` and `tracking` sections name the trackers.
        run: The run folder.
        host: Runs the followers.
        console: Shows where the run is tracked, and what was not sent.
        announce: Called with a tracker and where it shows the run.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        host: Host,
        console: Console,
        announce: Callable[[str, str], None] = lambda tracker, where: None,
    ) -> None:
        self._recipe = recipe
        self._run = run
        self._host = host
        self._console = console
        self._announce = announce
        self._followed: list[_Followed] = []
        self._polled = 0.0

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):  # the follower creates it once there is room
            run_id_of(self._run)
        for choice in choices(self._recipe):
            with contextlib.suppress(OSError):
                self._followed.append(_Followed(choice, name_of(choice), self._start(choice)))
        return self

    def poll(self) -> None:
        """Restart followers that ended, and announce what is new; at most once a second."""
        now = time.monotonic()
        if now - self._polled < POLL_S:
            return
        self._polled = now
        for followed in self._followed:
            self._revive(followed, now)
            self._show(followed)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        patience = self._recipe.tracking.drain_s
        deadline = time.monotonic() + (min(patience, INTERRUPTED_S) if interrupted else patience)
        try:
            self._finish(deadline)
        except KeyboardInterrupt:  # the run itself has ended: only its trackers are cut short
            pass
        finally:
            for followed in self._followed:
                followed.process.kill()
        for followed in self._followed:
            self._show(followed)
            self._report(followed)

    def _start(self, choice: str) -> Companion:
        log = self._run / TRACKING / f"{name_of(choice)}.log"
        arguments = ["-m", MODULE, str(self._run), choice]
        return self._host.start_companion(arguments, log, _ENVIRONMENT)

    def _revive(self, followed: _Followed, now: float) -> None:
        """Start a follower that ended again, after a pause; a few times."""
        if followed.process.status is None or followed.restarts >= RESTARTS:
            return
        if followed.restart_at is None:
            pause = min(FIRST_RESTART_S * 2**followed.restarts, LAST_RESTART_S)
            followed.restart_at = now + pause
            logger.info("%s ended: %s", followed.name, followed.process.status)
            self._warn(followed, _end_of(followed.process.status))
        elif now >= followed.restart_at:
            followed.restart_at = None
            followed.restarts += 1
            with contextlib.suppress(OSError):
                followed.process = self._start(followed.choice)

    def _show(self, followed: _Followed) -> None:
        """Announce where a tracker shows the run, and its first failure; each once."""
        state = read_state(self._run, followed.name)
        if state.where and state.where != followed.where:
            followed.where = state.where
            shown = state.where if "://" in state.where else f"`{state.where}` shows this run"
            self._console.line(f"{state.label}: {shown}")
            self._announce(state.label, state.where)
        if state.error:
            self._warn(followed, state.error)

    def _warn(self, followed: _Followed, text: str) -> None:
        if not followed.warned:
            followed.warned = True
            self._console.line(f"{followed.name}: {text}; the run continues, and this is retried")

    def _finish(self, deadline: float) -> None:
        """Let the followers send what is left, until `deadline`."""
        for followed in self._followed:
            if followed.process.status not in (None, 0):  # ended early: one more try
                with contextlib.suppress(OSError):
                    followed.process = self._start(followed.choice)
            followed.process.ask_to_end()
        shown = False
        for followed in self._followed:
            if not followed.process.wait(min(2.0, deadline - time.monotonic())) and not shown:
                shown = True
                self._console.line(
                    f"waiting at most {max(0.0, deadline - time.monotonic()):.0f} s for trackers"
                )
            followed.process.wait(deadline - time.monotonic())

    def _report(self, followed: _Followed) -> None:
        self._console.line(delivery_line(self._run, followed.choice)[0])


def send_rest(recipe: Recipe, run: Path, console: Console) -> None:
    """Send what earlier commands did not send of a finished run."""
    reader = RunReader(run)
    states = [read_state(run, name_of(choice)) for choice in choices(recipe)]
    if any(state.stages and not delivery_of(reader, state).complete for state in states):
        host = Host({})
        with host, RunTracking(recipe, run, host, console):
            pass


def delivery_line(run: Path, choice: str) -> tuple[str, bool]:
    """Return one line on what was sent and what was not, and whether everything was."""
    state = read_state(run, name_of(choice))
    delivery = delivery_of(RunReader(run), state)
    done = "recorded" if choice in _LOCAL else "sent"
    line = f"{state.label or name_of(choice)}: {delivery.sent} of {delivery.total} steps {done}"
    if delivery.complete and not state.error:
        return line, True
    if delivery.unconfirmed:
        line += f", {delivery.unconfirmed} of them not confirmed"
    reason = state.error
    with contextlib.suppress(OSError):
        lack = shortage(run / TRACKING)
        reason = lack.text.rstrip(".") if lack is not None else reason
    line += f" ({reason})" if reason else ""
    sync = choice in WANDB.values()
    rest = f"`rcot wandb sync {run}`" if sync else "the same command, run again,"
    return f"{line}; {rest} sends the rest", False


def _end_of(status: int | None) -> str:
    if status is not None and status < 0:
        if -status == signal.SIGALRM:
            return "the tracker did not answer"
        return f"its follower was ended by {signal.Signals(-status).name}"
    return f"its follower ended with status {status}"
