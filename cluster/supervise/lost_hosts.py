"""Detect in a stage's log that Ray lost a host or a worker.

Ray declares a silent host dead after about a minute, and reports it to every driver. verl 0.9.1
ignores the report: its trainer keeps waiting for responses from the lost host and logs a line per
minute, so the log is never silent either. Whoever follows the log must end the stage. Ray reports a
dead worker at once; the stage may continue without it, or wait for it forever.

The head's host is not covered: the supervisor is lost with it.
"""

from __future__ import annotations

import re
from pathlib import Path

from cluster.supervise.processes import StageFailed

_HOST_DEAD = re.compile(
    rb"The node with node id: [0-9a-f]{1,80} and address: ([\w.:\[\]-]{1,80}) and node name: "
    rb"[^\n]{1,200}? has been marked dead"
)
_WORKER_DIED = b"A worker died or was killed while executing a task"


class _LogTail:
    """Reads what was appended to a log since the last read."""

    _OVERLAP: int
    """Bytes that are read twice, because the last message may have been half written."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._offset = 0

    def _read_new(self) -> bytes:
        """Return the new bytes; empty if the log does not exist yet."""
        if not self._log.is_file():
            return b""
        with self._log.open("rb") as file:
            file.seek(max(0, self._offset - self._OVERLAP))
            new = file.read()
            self._offset = file.tell()
        return new


class LossWatch(_LogTail):
    """Watches a log for hosts that Ray declared dead."""

    _OVERLAP = 500  # more than the longest message

    def poll(self) -> None:
        """Raise StageFailed if Ray declared a host dead since the last poll."""
        match = _HOST_DEAD.search(self._read_new())
        if match:
            raise StageFailed(f"lost host {match[1].decode()} (Ray: marked dead)", self._log)


class DeathWatch(_LogTail):
    """Watches a log for workers that died during a task."""

    _OVERLAP = len(_WORKER_DIED) - 1  # a message is never counted twice

    def poll(self) -> bool:
        """Return True if Ray reported a worker death since the last poll."""
        return _WORKER_DIED in self._read_new()
