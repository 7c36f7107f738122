"""Scale advantages per task, for batches that mix tasks.

Eq. 14 divides a response's reward, minus its group's mean, by the group's standard deviation. In a
batch of AKS (agentic keyframe selection, at most 3 points) and KTG (keyframe target grounding, at
most 6), a group whose rewards hardly differ then weighs as much as one whose rewards differ fully.
`per_task` divides by the task's spread over the step instead: groups keep their relative weight
within a task, and tasks have equal weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-6
"""verl's guard in eq. 14's denominator."""


def per_task(centered: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
    """Divide each centered reward by the root mean square of its task's centered rewards.

    Args:
        centered: float [N], each response's reward minus its group's mean.

    Returns:
        float64 [N], the advantages; 0 for a task whose rewards have no spread.
    """
    if len(centered) != len(tasks):
        raise ValueError(f"{len(centered)} advantages of {len(tasks)} tasks")
    values = np.asarray(centered, dtype=np.float64)
    names = np.asarray(tasks, dtype=object)
    advantages = np.zeros_like(values)
    for task in dict.fromkeys(tasks):
        rows = names == task
        advantages[rows] = values[rows] / (np.sqrt(np.mean(values[rows] ** 2)) + EPSILON)
    return advantages
