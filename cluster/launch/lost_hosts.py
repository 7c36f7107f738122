"""Notice that a host of a running stage is gone, from what Ray says in the driver's log.

Ray takes about a minute to declare a silent host dead, and tells every driver. verl 0.9.1 does not
act on it: its trainer goes on asking for responses that no host makes any more, and writes a line a
minute while it does, so that the log is never silent either. Whoever follows the log ends it.

Left out: the head's host, with which the supervisor goes too.
"""

from __future__ import annotations

import re
from pathlib import Path

from cluster.local import StageFailed

_DEAD = re.compile(
    rb"The node with node id: [0-9a-f]{1,80} and address: ([\w.:\[\]-]{1,80}) and node name: "
    rb"[^\n]{1,200}? has been marked dead"
)
_OVERLAP = 500
"""Bytes looked at twice, for a sentence that was half written: more than its longest."""


class LossWatch:
    """Reads what was added to `log` and raises StageFailed for the first host that Ray gave up."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._at = 0

    def poll(self) -> None:
        """Look at what is new; a log that is not there yet says nothing."""
        if not self._log.is_file():
            return
        with self._log.open("rb") as file:
            file.seek(max(0, self._at - _OVERLAP))
            new = file.read()
            self._at = file.tell()
        found = _DEAD.search(new)
        if found:
            raise StageFailed(f"lost host {found[1].decode()} (Ray: marked dead)", self._log)
