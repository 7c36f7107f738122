"""Changes of rewards, losses and J&F: their direction, and how a verdict writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rcot_rl.stats.expression_scores import level, paired_change, pooled_expressions
from rcot_rl.stats.intervals import Interval, paired_difference, shown_change

Direction = Literal["rose", "fell", "unclear", "unknown"]


def direction(change: Interval | None) -> Direction:
    """Return whether a change excludes 0."""
    if change is None or change.low is None or change.high is None:
        return "unknown"
    return "rose" if change.low > 0 else "fell" if change.high < 0 else "unclear"


def as_facts(before: Any, after: Any, change: Interval) -> dict[str, Any]:
    """Return levels, change, interval and direction as JSON values."""
    return {
        "before": before,
        "after": after,
        "change": change.mean,
        "low": change.low,
        "high": change.high,
        "direction": direction(change),
    }


def number_text(before: float, after: float) -> str:
    """Return the change of two rewards; it agrees with the levels as they are shown."""
    return f"{shown_change(before, after, 2):+.2f}"


def interval_text(change: Interval, digits: int) -> str:
    """Return the 95 % interval of a change in brackets."""
    if change.low is None or change.high is None:
        return "(one value)"
    return f"[{change.low:+.{digits}f}, {change.high:+.{digits}f}]"


def heldout_change(before: Any, after: Any) -> Interval | None:
    """Return the paired change of a held-out reward; None unless both have the same prompts.

    Args:
        before: Rewards of a checkpoint and way of decoding, with `per_prompt`; may be anything.
        after: Those of another checkpoint.
    """
    try:
        return paired_difference(before["per_prompt"], after["per_prompt"])
    except (KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class MasksChange:
    """J&F of two checkpoints over the expressions of all benchmarks."""

    before: float
    after: float
    change: Interval

    @property
    def text(self) -> str:
        """Levels, change and interval."""
        shown = f"{shown_change(self.before, self.after, 1):+.1f} {interval_text(self.change, 1)}"
        return f"{self.before:.1f} to {self.after:.1f}, {shown}"


def masks_between(scores: Mapping[str, Any], start: str | None, end: str) -> MasksChange | None:
    """Return J&F of two checkpoints; None unless both have the same expressions."""
    before, after = (pooled_expressions(scores, str(name)) for name in (start, end))
    change, levels = paired_change(before, after), (level(before), level(after))
    if change is None or levels[0] is None or levels[1] is None:
        return None
    return MasksChange(levels[0].mean, levels[1].mean, change)
