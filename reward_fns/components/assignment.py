"""The one-to-one assignment with the greatest sum (before eq. 12), solved exactly.

Almost every call has one to three objects on a side; these are searched exhaustively in plain
Python. In most larger tables every row has its greatest score in a different column, which no
assignment can beat. The rest goes to scipy, which is imported only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Pairs = list[tuple[int, int]]
SEARCHED = (3, 4)
"""Shorter and longer side up to which all assignments are tried: at most 24."""


def best_assignment(scores: Sequence[Sequence[float]] | np.ndarray) -> Pairs:
    """Return the min(n, m) pairs (i, j) that maximise the sum of scores[i][j].

    Args:
        scores: Non-negative scores [n, m], with n and m at least 1.
    """
    n, m = len(scores), len(scores[0])
    if min(n, m) > SEARCHED[0] or (min(n, m) > 1 and max(n, m) > SEARCHED[1]):
        return _solve(scores)
    if n <= m:
        return [(i, j) for i, j in enumerate(_search(scores))]
    transposed = [[scores[i][j] for i in range(n)] for j in range(m)]
    return [(i, j) for j, i in enumerate(_search(transposed))]


def _search(scores: Sequence[Sequence[float]] | np.ndarray) -> tuple[int, ...]:
    """Return the column of each row: the best of all injections of rows into columns."""
    best = -1.0
    choice: tuple[int, ...] = ()
    for columns in permutations(range(len(scores[0])), len(scores)):
        total = 0.0
        for row, column in zip(scores, columns, strict=True):
            total += row[column]
        if total > best:
            best, choice = total, columns
    return choice


def _solve(scores: Sequence[Sequence[float]] | np.ndarray) -> Pairs:
    import numpy as np

    table = np.asarray(scores, dtype=float)
    if table.shape[0] > table.shape[1]:
        return [(i, j) for j, i in _solve(table.T)]
    first = table.argmax(axis=1)
    if len(np.unique(first)) == len(first):  # every row gets its greatest score
        return list(enumerate(first.tolist()))
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(table, maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))
