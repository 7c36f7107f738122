"""Components and group health of one GRPO step: what verl 0.9.1 does not log.

Means and spreads of the reward (eq. 13) and of each of its components, the share of groups whose
advantages (eq. 14) are all zero, how often each reason code was given, and what scoring took.
Imports neither verl nor torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

MAX_CODES = 64
"""Reason codes of one step with a metric of their own. A user's function that writes numbers into
its reasons must not make thousands of them: the rarer ones are counted together, as `other`."""


def reward_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means, spreads and group health of one step's responses.

    rows: `uid` names the group; `reward`, `components`, `reasons` as scored; if known, `seconds` of
    scoring and `generate_s` of generating. A component that a row lacks is 0 there: a user's
    function failed before it had named any. A group has no variance when all its rewards are equal:
    its advantages (eq. 14) are then all zero. `reason/<code>` is a share of the responses,
    `reason_count/<code>` their number.
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
        "group/zero_variance_fraction": float((spreads < 1e-8).mean()),
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
    for code, count in _few(reasons).items():
        metrics[f"reason/{code}"] = count / len(rows)
        metrics[f"reason_count/{code}"] = float(count)
    return metrics


def last_turns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each response (`uid`, `sample`), the row of its last `turn`, which is the one scored."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["uid"], row["sample"])
        if key not in found or row["turn"] > found[key]["turn"]:
            found[key] = row
    return list(found.values())


def _few(reasons: Counter[str]) -> dict[str, int]:
    """The most frequent codes, and the sum of the others' counts; ties by name."""
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    found = dict(ranked[:MAX_CODES])
    if rest := sum(count for _, count in ranked[MAX_CODES:]):
        found["other"] = found.get("other", 0) + rest
    return found
