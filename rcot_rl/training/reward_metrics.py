"""Reward components and group health of one GRPO step, which verl 0.9.1 does not log.

Means and spreads of the reward (eq. 13) and of each component, the share of groups whose advantages
(eq. 14) are all zero, how often each reason code occurred, and the seconds of scoring. Imports
neither verl nor torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from rcot_rl.stats.rollout_rows import NO_SPREAD

MAX_CODES = 64
"""Reason codes per step that get their own metric; rarer ones are counted together as `other`.

A user's function that writes numbers into its reasons must not create thousands of metrics."""


def reward_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Compute means, spreads and group health of one step's responses.

    A component that a row lacks counts as 0: a user's function failed before it named any. A group
    whose rewards are all equal has no variance, so its advantages (eq. 14) are all zero.

    Args:
        rows: One per response: `uid` (its group), `reward`, `components` and `reasons` as scored
            and, if known, `seconds` of scoring and `generate_s` of generating.

    Returns:
        The metrics. `reason/<code>` is a share of the responses, `reason_count/<code>` a number.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    names = dict.fromkeys(name for row in rows for name in row["components"])
    reasons: Counter[str] = Counter()
    for row in rows:
        groups[row["uid"]].append(row["reward"])
        reasons.update(set(row["reasons"]))
    rewards = np.array([row["reward"] for row in rows])
    spreads = np.array([np.std(g) for g in groups.values()])
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "group/zero_variance_fraction": float((spreads < NO_SPREAD).mean()),
        "group/reward_std_mean": float(spreads.mean()),
    }
    for name in names:
        values = [row["components"].get(name, 0.0) for row in rows]
        metrics[f"reward/{name}/mean"] = float(np.mean(values))
        metrics[f"reward/{name}/std"] = float(np.std(values))
    for key, name in (("seconds", "reward/seconds"), ("generate_s", "response/seconds")):
        seconds = [row[key] for row in rows if row.get(key) is not None]
        if seconds:
            metrics[f"{name}_mean"] = float(np.mean(seconds))
            metrics[f"{name}_max"] = float(np.max(seconds))
    for code, count in _most_frequent(reasons).items():
        metrics[f"reason/{code}"] = count / len(rows)
        metrics[f"reason_count/{code}"] = float(count)
    return metrics


def _most_frequent(reasons: Counter[str]) -> dict[str, int]:
    """Return the counts of MAX_CODES codes, and the sum of the others; ties go by name."""
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    counts = dict(ranked[:MAX_CODES])
    if rest := sum(count for _, count in ranked[MAX_CODES:]):
        counts["other"] = counts.get("other", 0) + rest
    return counts
