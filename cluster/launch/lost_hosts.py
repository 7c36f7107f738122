"""Notice that a host or a worker of a running stage is gone, from what Ray says in its log.

Ray takes about a minute to declare a silent host dead, and tells every driver. verl 0.9.1 does not
act on it: its trainer goes on asking for responses that no host makes any more, and writes a line a
minute while it does, so that the log is never silent either. Whoever follows the log ends it. Of a
worker that dies Ray tells at once; a stage may go on without it, or wait for ever.

Left out: the head's host, with which the supervisor goes too.
"""

from __future__ import annotations

import re
from pathlib import Path

from cluster.supervise.processes import StageFailed

_DEAD = re.compile(
    rb"The node with node id: [0-9a-f]{1,80} and address: ([\w.:\[\]-]{1,80}) and node name: "
    rb"[^\n]{1,200}? has been marked dead"
)
_DIED = b"A worker died or was killed while executing a task"


class _Log:
    """What was added to a log since it was last asked for."""

    _OVERLAP: int
    """Bytes looked at twice, for a sentence that was half written."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._at = 0

    def _new(self) -> bytes:
        """A log that is not there yet says nothing."""
        if not self._log.is_file():
            return b""
        with self._log.open("rb") as file:
            file.seek(max(0, self._at - self._OVERLAP))
            new = file.read()
            self._at = file.tell()
        return new


class LossWatch(_Log):
    """Raises StageFailed for the first host that Ray gave up."""

    _OVERLAP = 500  # more than its longest

    def poll(self) -> None:
        """Look at what is new."""
        found = _DEAD.search(self._new())
        if found:
            raise StageFailed(f"lost host {found[1].decode()} (Ray: marked dead)", self._log)


class DeathWatch(_Log):
    """Tells when Ray has said that a worker died which was at work."""

    _OVERLAP = len(_DIED) - 1  # never the same sentence twice

    def poll(self) -> bool:
        """Whether it has, in what is new."""
        return _DIED in self._new()
