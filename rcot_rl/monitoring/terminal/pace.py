"""Rates, durations and dates of work in progress, as text that fits in a terminal's line."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence

WINDOW = 10
"""Steps that the rate is measured over."""


def seconds_per_step(ended: Sequence[tuple[int, float]]) -> float | None:
    """Return the seconds between the ends of the last steps.

    The median ignores a restart and a checkpoint among them. Steps that were read together have one
    time; their mean is used instead.

    Args:
        ended: Number and end of each step in order; ends are seconds since the epoch.

    Returns:
        None if it is unknown yet.
    """
    last = ended[-WINDOW - 1 :]
    if len(last) < 2 or last[-1][0] <= last[0][0]:
        return None
    gaps = [later[1] - earlier[1] for earlier, later in itertools.pairwise(last)]
    middle = statistics.median(gaps)
    mean = (last[-1][1] - last[0][1]) / (last[-1][0] - last[0][0])
    return max(0.0, middle if middle > 0 else mean) or None


def duration_text(seconds: float) -> str:
    """Return a duration in one unit, such as `45 s`, `12 min`, `13.2 h` or `2.1 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def pace_text(seconds: float) -> str:
    """Return the time of a step with three digits, such as `4.63 s`, `92.1 s` or `450 s`."""
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"


def moment_text(when: float) -> str:
    """Return the local date and time of a moment, such as `27 Nov 20:14`."""
    try:
        moment = time.localtime(when)
    except (OverflowError, OSError, ValueError):
        return "unknown"
    return f"{moment.tm_mday} {_MONTHS[moment.tm_mon - 1]} {moment.tm_hour:02d}:{moment.tm_min:02d}"


# the same in every locale
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def left_text(seconds: float) -> str:
    """Return how long work still takes and when it ends, such as `12 min left (27 Nov 20:14)`."""
    seconds = max(0.0, seconds)
    return f"{duration_text(seconds)} left ({moment_text(time.time() + seconds)})"


def clock_text(seconds: float) -> str:
    """Return a duration as minutes and seconds, or as hours, minutes and seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
