"""The recipe's section on failures: when a stage is started again, and when it is given up."""

from __future__ import annotations

from pydantic import Field

from rcot_rl.recipe.base import Section


class SuperviseSection(Section):
    """Stages that run in processes of their own are started again from their last checkpoint."""

    max_attempts: int = Field(default=5, ge=1)
    """Starts of a stage within the window. 1: a failure ends the run."""

    window_minutes: float = Field(default=720.0, gt=0)
    """Failures longer ago than this are forgotten."""

    backoff_s: float = Field(default=5.0, ge=0)
    """Wait before the next start; doubled, up to five minutes, for each failure in a row at one
    step."""

    disk_wait_minutes: float = Field(default=60.0, ge=0)
    """How long a stage waits for space, inodes or quota before its next start. 0: a shortage ends
    the run, as a read-only file system always does."""

    heartbeat_s: float | None = Field(default=None, gt=0)
    """A training stage that makes no step for so long is hung: its stacks are written, it is ended
    and started again. None: ten times the longest step of this attempt, and ten minutes at least.
    (`cluster.stall_timeout_s` is for logs that say nothing at all.)"""

    startup_s: float = Field(default=3600.0, gt=0)
    """The same, before the first step; without `heartbeat_s`, also before the second, for until
    then nobody knows how long a step takes."""

    deadline_hours: float | None = Field(default=None, gt=0)
    """A stage's process that runs longer is ended, and not started again. None: none."""
