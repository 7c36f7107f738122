"""Advantages where one batch holds several tasks: each task's rewards on a scale of their own.

Eq. 14 divides a response's reward, less its group's mean, by the group's standard deviation. In a
batch of AKS (at most 3 points) and KTG (at most 6) that gives a group whose rewards differ by a
hair the weight of one that differs by all. `per_task` divides by the task's spread over the step
instead: groups keep their relative weight inside a task, and the tasks theirs to one another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-6
"""verl's guard in eq. 14's denominator."""


def per_task(centred: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
    """float64 [N]: each response's advantage.

    centred: [N], reward less the group's mean; tasks: the task of each response. The spread of a
    task is the root mean square of its centred rewards in this step. A task without any spread has
    advantages of 0. Raises ValueError when the lengths differ.
    """
    if len(centred) != len(tasks):
        raise ValueError(f"{len(centred)} advantages of {len(tasks)} tasks")
    values = np.asarray(centred, dtype=np.float64)
    names = np.asarray(tasks, dtype=object)
    result = np.zeros_like(values)
    for task in dict.fromkeys(tasks):
        mine = names == task
        result[mine] = values[mine] / (np.sqrt(np.mean(values[mine] ** 2)) + EPSILON)
    return result
