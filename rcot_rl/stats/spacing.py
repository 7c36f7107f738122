"""Evenly spaced choices, for what is too much to show."""

from __future__ import annotations


def evenly_spaced(n: int, most: int) -> list[int]:
    """Return at most `most` indices of `n` items, ascending; the last only if `most` is 1.

    With two or more, the first and the last item are among them.
    """
    if n <= most:
        return list(range(n))
    if most <= 1:
        return [n - 1] * most
    return [round(k * (n - 1) / (most - 1)) for k in range(most)]
