"""The recipe's section on failures: when to retry a stage and when to give up."""

from __future__ import annotations

from pydantic import Field

from rcot_rl.recipe.base import Section


class SuperviseSection(Section):
    """Retries and timeouts of a stage's processes. A retry resumes from the last checkpoint."""

    max_attempts: int = Field(default=5, ge=1)
    """Maximum number of attempts within `window_minutes`. 1: no retries."""

    window_minutes: float = Field(default=720.0, gt=0)
    """Failures older than this do not count towards `max_attempts`."""

    backoff_s: float = Field(default=5.0, ge=0)
    """Seconds before a retry; doubled for each further failure at the same step, up to five
    minutes."""

    disk_wait_minutes: float = Field(default=60.0, ge=0)
    """Minutes that a retry waits for disk space, inodes or quota. 0: a shortage ends the run. A
    read-only file system always ends it."""

    heartbeat_s: float | None = Field(default=None, gt=0)
    """Seconds without a training step after which a stage is hung: its stacks are written, its
    processes are ended, and it is retried. None: ten times the longest step of this attempt, at
    least ten minutes. See `cluster.stall_timeout_s` for logs without output."""

    startup_s: float = Field(default=3600.0, gt=0)
    """The same limit before the first step. Without `heartbeat_s` it also applies before the second
    step, because the step time is unknown until then."""

    deadline_hours: float | None = Field(default=None, gt=0)
    """Maximum run time of a stage's process, in hours; beyond it, the process is ended and not
    retried. None: no deadline."""
