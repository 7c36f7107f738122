"""An alert: something in a run that a person should look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AlertCode = Literal[
    "reward_collapse",
    "kl_runaway",
    "zero_variance",
    "parse_failures",
    "truncation",
    "format_only",
    "hang",
    "restart",
    "disk",
]


@dataclass(frozen=True)
class Alert:
    """One alert of a stage. Each code is raised once, until its condition has cleared."""

    code: AlertCode
    level: Literal["warning", "error"]
    stage: str
    step: int
    """Step at which the condition was met; 0 before the first step."""

    title: str
    """A few words, for a list."""

    text: str
    """One or two sentences: the observed values, the rule's bound, and what to do."""
