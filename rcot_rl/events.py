"""Events that a stage's child process prints for its parent.

An event is a line `RCOT {"event": KIND, …}` on the child's standard output. The line stays in the
child's log, among the lines of Ray, verl and vLLM.

    note      message                    a message for the user
    progress  what, done, total, rate    progress in items
    heldout   what, sampled, greedy      mean held-out rewards
    fault     faults                     the input is invalid: one line per fault; the process exits
                                         with status 2
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rcot_rl.errors import InputError
from rcot_rl.system.logs import configure_logging

Kind = Literal["note", "progress", "heldout", "fault"]
INPUT_FAULT = 2
"""Exit status of a process whose input or configuration is invalid."""

_MARK = b"RCOT "


def emit(event: Kind, **facts: Any) -> None:
    """Print an event for the parent."""
    print("RCOT " + json.dumps({"event": event, **facts}), flush=True)


@contextmanager
def child_process() -> Iterator[None]:
    """Run the main function of a child: log at INFO, and report an InputError to the parent.

    The error becomes a `fault` event and exit status 2.
    """
    configure_logging(logging.INFO)
    try:
        yield
    except InputError as error:
        emit("fault", faults=error.faults)
        sys.exit(INPUT_FAULT)


class EventReader:
    """Reader of the events that a process appends to its log.

    Args:
        log: The process's log, which may not exist yet. Its present contents are skipped.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._offset = log.stat().st_size if log.is_file() else 0

    def poll(self) -> list[dict[str, Any]]:
        """Return the events since the last call, without a line that is not complete yet."""
        if not self._log.is_file():
            return []
        with self._log.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [event for line in whole.splitlines() if (event := _event(line)) is not None]


def _event(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(_MARK):
        return None
    try:
        event = json.loads(line[len(_MARK) :])
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None
