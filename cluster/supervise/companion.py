"""A process that is kept while a run's stages start and end, such as a follower of trackers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

from cluster.supervise import keeper
from rcot_rl.system import machine

_KILL_S = 5.0
"""Seconds that killed processes may take to end."""


class Companion:
    """A process below a keeper. It ends once its standard input is closed, or is killed."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._keeper = process
        self.started = time.monotonic()

    @property
    def pid(self) -> int:
        """Pid of the keeper, whose descendants are the companion's processes."""
        return self._keeper.pid

    @property
    def status(self) -> int | None:
        """Exit status, or the negative signal that ended it; None while it runs."""
        return self._keeper.poll()

    def ask_to_end(self) -> None:
        """Close the companion's standard input, after which it finishes its work.

        It gets its share of the CPUs back, as far as the system permits: on busy CPUs a process of
        low priority needs seconds even to end.
        """
        for pid in keeper.descendants(self.pid):
            machine.set_niceness(pid, 0)
        if self._keeper.stdin is not None:
            with contextlib.suppress(OSError):
                self._keeper.stdin.close()

    def wait(self, seconds: float) -> bool:
        """Return True if the companion ends within `seconds`."""
        try:
            self._keeper.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End the companion's processes at once."""
        self.ask_to_end()
        deadline = time.monotonic() + _KILL_S
        while self.status is None and time.monotonic() < deadline:
            for pid in keeper.descendants(self.pid):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self.wait(0.1)
