"""Components and group health of one GRPO step: what verl 0.9.1 does not log.

Means and spreads of the reward (eq. 13) and of each of its components, the share of groups whose
advantages (eq. 14) are all zero, and how often each reason code was given. Imports neither verl nor
torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np


def reward_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means, spreads and group health of one step's responses.

    rows: `uid` names the group; `reward`, `components`, `reasons` as scored. A group has no
    variance when all its rewards are equal: its advantages (eq. 14) are then all zero.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    columns: dict[str, list[float]] = defaultdict(list)
    reasons: Counter[str] = Counter()
    for row in rows:
        groups[row["uid"]].append(row["reward"])
        for name, value in row["components"].items():
            columns[name].append(value)
        reasons.update(set(row["reasons"]))
    rewards = np.array([row["reward"] for row in rows])
    spreads = np.array([np.std(g) for g in groups.values()])
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "group/zero_variance_fraction": float((spreads < 1e-8).mean()),
        "group/reward_std_mean": float(spreads.mean()),
    }
    for name, values in columns.items():
        metrics[f"reward/{name}/mean"] = float(np.mean(values))
        metrics[f"reward/{name}/std"] = float(np.std(values))
    for code, count in reasons.items():
        metrics[f"reason/{code}"] = count / len(rows)
    return metrics
