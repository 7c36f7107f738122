"""COCO run-length masks, decoded with numpy.

A compressed RLE is text: runs of background and foreground in column-major order, alternating,
from the third foreground or background run on stored as the difference to the run two before, each
number in base 32 with a sign and continuation bit and an offset of 48. Leaves out encoding, which
nothing here needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_MAX_PIXELS = 1 << 26
_MAX_DIGITS = 7


def decode(rle: Any) -> np.ndarray:
    """bool [H, W] of a COCO RLE `{"size": [H, W], "counts": str | bytes | list}`.

    Raises ValueError for anything that is not one: wrong types, digits out of range, negative
    runs, or runs that do not add up to H * W.
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError("an RLE needs 'size' and 'counts'")
    size, counts = rle["size"], rle["counts"]
    ok = isinstance(size, list | tuple) and len(size) == 2
    if not ok or not all(type(s) is int and s > 0 for s in size):
        raise ValueError("'size' must be two positive integers [H, W]")
    height, width = size
    if height * width > _MAX_PIXELS:
        raise ValueError(f"a mask of {height} x {width} is too large")
    runs = _listed(counts) if isinstance(counts, list) else _runs(counts)
    if runs.size and runs.min() < 0:
        raise ValueError("a run of negative length")
    if runs.size > height * width + 1 or int(runs.sum()) != height * width:
        raise ValueError(f"runs do not add up to {height} x {width}")
    bits = np.repeat(np.arange(runs.size) % 2 == 1, runs)
    return np.ascontiguousarray(bits.reshape(width, height).T)


def _listed(counts: list[Any]) -> np.ndarray:
    if not all(type(c) is int and 0 <= c <= _MAX_PIXELS for c in counts):
        raise ValueError("'counts' must be non-negative integers")
    return np.asarray(counts, dtype=np.int64)


def _runs(counts: Any) -> np.ndarray:
    if isinstance(counts, str):
        counts = counts.encode("utf-8")
    if not isinstance(counts, bytes):
        raise ValueError("'counts' must be a string or a list")
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if digits.size == 0:
        return digits
    if digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("'counts' holds a character that no RLE has, or is cut short")
    ends = np.flatnonzero(digits & 32 == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > _MAX_DIGITS:
        raise ValueError("a run with too many digits")
    place = np.arange(digits.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    negative = digits[ends] & 16 != 0
    values[negative] -= np.left_shift(1, 5 * lengths[negative])
    # Runs 0, 1 and 2 are absolute; run i > 2 is relative to run i - 2.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
