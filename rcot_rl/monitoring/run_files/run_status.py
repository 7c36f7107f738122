"""RUN/status.json: what the running command is at, for `rcot watch` and trackers.

The command replaces the file atomically, at most once a second, and once more when it ends. A
command that was killed leaves the state `running`: `is_running` is then False, because the file is
no longer refreshed.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from rcot_rl.system.files import write_text

STATUS = "status.json"
REFRESH_S = 10.0
"""A running command refreshes the file at least this often."""
STALE_S = 60.0
"""A file that was not refreshed for this long belongs to a command that was killed."""


@dataclass
class RunStatus:
    """What a command does. Times are seconds since the epoch."""

    state: Literal["running", "done", "failed", "interrupted"]
    started: float
    updated: float
    host: str
    pid: int
    stages: list[str]
    """Stages of this command, in order."""

    stage: str | None = None
    """Stage that runs or ran last."""

    stage_started: float | None = None
    step: int = 0
    """Optimizer steps done; 0 for a stage without steps."""

    total_steps: int = 0
    seconds_per_step: float | None = None
    """Median of the last steps."""

    work: str = ""
    """Work in progress of a stage without steps, such as `expressions`."""

    work_done: int = 0
    work_total: int = 0
    work_started: float | None = None
    message: str = ""
    """Last line of the console; after a failure, the verdict."""

    tracking: dict[str, str] = field(default_factory=dict)
    """Tracker -> where to see the run, or the command that sends it."""

    @property
    def is_running(self) -> bool:
        """True if the command refreshed the file lately."""
        return self.state == "running" and time.time() - self.updated < STALE_S


_STATUS_FILE = TypeAdapter(RunStatus)


def read_status(run: Path) -> RunStatus | None:
    """Return RUN/status.json; None if it is missing or invalid."""
    try:
        return _STATUS_FILE.validate_json((run / STATUS).read_bytes())
    except (OSError, ValueError):
        return None


def write_status(run: Path, status: RunStatus) -> None:
    """Replace RUN/status.json."""
    write_text(run / STATUS, json.dumps(asdict(status)) + "\n")
