"""The one-to-one assignment with the greatest sum (before eq. 12), exactly.

Almost every call has one to three objects on a side: those are searched whole, in plain Python.
The rest goes to scipy, which is imported only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Pairs = list[tuple[int, int]]
TINY = (3, 4)
"""Sides up to which all assignments are tried: at most 24."""


def best_assignment(masks: Sequence[Sequence[int]] | np.ndarray, table: Sequence[float]) -> Pairs:
    """Pairs (i, j), min(n, m) of them, that maximise the sum of table[masks[i][j]].

    masks: [n, m], n and m at least 1; table: the non-negative score of each mask.
    """
    n, m = len(masks), len(masks[0])
    if min(n, m) > TINY[0] or (min(n, m) > 1 and max(n, m) > TINY[1]):
        return _solve(masks, table)
    if n <= m:
        scores = [[table[mask] for mask in row] for row in masks]
        return [(i, j) for i, j in enumerate(_search(scores))]
    scores = [[table[masks[i][j]] for i in range(n)] for j in range(m)]
    return [(i, j) for j, i in enumerate(_search(scores))]


def _search(scores: list[list[float]]) -> tuple[int, ...]:
    """For each row its column: the best of all injections of rows into columns."""
    best = -1.0
    choice: tuple[int, ...] = ()
    for columns in permutations(range(len(scores[0])), len(scores)):
        total = 0.0
        for row, column in zip(scores, columns, strict=True):
            total += row[column]
        if total > best:
            best, choice = total, columns
    return choice


def _solve(masks: Sequence[Sequence[int]] | np.ndarray, table: Sequence[float]) -> Pairs:
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    scores = np.asarray(table)[np.asarray(masks)]
    rows, columns = linear_sum_assignment(scores, maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))
