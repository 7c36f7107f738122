"""Keeps RUN/status.json up to date while a command runs."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rcot_rl.monitoring.run_files.run_status import REFRESH_S, RunStatus, write_status

LEAST_S = 1.0
"""Seconds between two writes, at least."""


class StatusWriter:
    """Writes RUN/status.json in a thread of its own, so that a slow disk delays no step.

    A write that fails is left out: the file never ends a run. Within `with`, the state is
    `running`; afterwards it tells how the body ended.

    Args:
        run: The run folder.
        stages: Stages of the command, in order.
    """

    def __init__(self, run: Path, stages: Sequence[str]) -> None:
        now = time.time()
        self._run = run
        self._status = RunStatus(
            state="running",
            started=now,
            updated=now,
            host=socket.gethostname(),
            pid=os.getpid(),
            stages=list(stages),
        )
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="status", daemon=True)

    def update(self, **values: Any) -> None:
        """Set fields of the `RunStatus`. They are written within a second."""
        with self._lock:
            for key, value in values.items():
                setattr(self._status, key, value)
        self._changed.set()

    def track(self, tracker: str, where: str) -> None:
        """Set where a tracker shows the run: a URL, or the command that sends it."""
        with self._lock:
            self._status.tracking = {**self._status.tracking, tracker: where}
        self._changed.set()

    def __enter__(self) -> StatusWriter:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._changed.set()
        self._thread.join(timeout=5)  # a dead network file system must not hold the command
        if self._thread.is_alive():
            return
        if isinstance(error, KeyboardInterrupt):
            self.update(state="interrupted", message="interrupted")
        elif error is not None:
            self.update(state="failed", message=f"{error}" or type(error).__name__)
        else:
            self.update(state="done")
        self._write()

    def _refresh(self) -> None:
        while not self._ended.is_set():
            self._changed.wait(REFRESH_S / 2)
            self._changed.clear()
            if not self._ended.is_set():
                self._write()
                self._ended.wait(LEAST_S)

    def _write(self) -> None:
        with self._lock:
            self._status.updated = time.time()
            values = RunStatus(**vars(self._status))
        with contextlib.suppress(OSError):
            write_status(self._run, values)
