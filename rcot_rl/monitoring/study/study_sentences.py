"""One sentence for each effect and each table of a study: what it shows, and what it does not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from rcot_rl.monitoring.study.study_effects import Effect, RewardChange, excludes_zero
from rcot_rl.monitoring.study.study_markdown import effect_text, interval_text, plain
from rcot_rl.stats.intervals import Interval

_MOST_PAIRS = 3
"""Pairs of rows that a sentence names."""


def effect_sentence(
    name: str, effect: Effect, against: str, what: str = "J&F", paper: float | None = None
) -> str:
    """Return what an effect shows.

    Args:
        name: The row.
        against: The reference.
        what: The figure.
        paper: The paper's effect, if it has one.
    """
    start = f"{plain(name)}: {effect_text(effect.mean)} {plain(what)} against {plain(against)}, "
    if effect.is_zero:
        return start + "not shown: all scores are equal to the reference's."
    intervals = {"clips": effect.over_clips, "seeds": effect.over_seeds}
    return start + f"{_judgement(intervals)}{_beside(effect, paper)}."


def reward_sentence(change: RewardChange, start: str, final: str) -> str:
    """Return what the change of a held-out reward shows."""
    name = f"Held-out reward of {plain(change.task.upper())}, {change.way} responses"
    difference = effect_text(change.after - change.before, 3)
    text = f"{name}: {difference} after {plain(final)} against {plain(start)}, "
    if change.over_prompts is None:
        return text + "not shown: the seeds have other prompts."
    intervals = {"prompts": change.over_prompts, "seeds": change.over_seeds}
    return text + _judgement(intervals, digits=3) + "."


def _judgement(intervals: Mapping[str, Interval], digits: int = 2) -> str:
    """Return `… shown`, or why an effect is not.

    Args:
        intervals: What the sample is, in the plural -> interval.
    """
    lacks = []
    for over, interval in intervals.items():
        if interval.low is None:
            lacks.append(f"there is only one {over[:-1]}")
        elif not excludes_zero(interval):
            lacks.append(
                f"the interval over {over} {interval_text(interval, digits)} includes zero"
            )
    if lacks:
        return f"not shown: {' and '.join(lacks)}"
    return f"interval excludes zero over {' and over '.join(intervals)}: shown"


def _beside(effect: Effect, paper: float | None) -> str:
    if paper is None:
        return ""
    shown = f"the paper has {effect_text(paper, 1)}"
    if not effect.is_shown or round(paper, 1) == 0:
        return f"; {shown}"
    same = (effect.mean > 0) == (paper > 0)
    return f"; {shown}, {'the same sign' if same else 'the opposite sign'}"


def order_sentence(
    levels: Mapping[str, float],
    paper: Mapping[str, float],
    shown: Sequence[tuple[str, str]],
) -> str:
    """Return whether the rows of a table are in the paper's order; empty for fewer than 3 rows.

    Two rows have one effect, whose own sentence says more.

    Args:
        levels: Row -> our level.
        paper: Row -> the paper's level.
        shown: Pairs of rows (lower, higher here) whose difference is shown.
    """
    if len(levels) < 3:
        return ""
    rows = sorted(levels, key=lambda row: paper[row])
    pairs = [
        (low, high)
        for low, high in itertools.combinations(rows, 2)
        if round(paper[low], 2) != round(paper[high], 2)
    ]
    equal = [(low, high) for low, high in pairs if levels[low] == levels[high]]
    swapped = [(low, high) for low, high in pairs if levels[low] > levels[high]]
    kept = len(pairs) - len(equal) - len(swapped)
    n_kept = sum((low, high) in shown for low, high in pairs)
    n_swapped = sum((high, low) in shown for low, high in pairs)
    if equal or swapped:
        names = [f"{plain(low)} is above {plain(high)}" for low, high in swapped]
        names += [f"{plain(low)} is equal to {plain(high)}" for low, high in equal]
        more = f" and {len(names) - _MOST_PAIRS} more" if len(names) > _MOST_PAIRS else ""
        first = ", ".join(names[:_MOST_PAIRS])
        start = f"The paper's order of rows does not hold in the means: {first}{more}"
    else:
        start = f"The paper's order of rows holds in the means: {' < '.join(map(plain, rows))}"
    counts = [f"{kept} of {len(pairs)} pairs are in the paper's order ({n_kept} shown)"]
    if swapped:
        counts.append(f"{len(swapped)} in the opposite one ({n_swapped} shown)")
    if equal:
        counts.append(f"{len(equal)} equal")
    return f"{start}; {', '.join(counts)}."
