"""COCO run-length masks, by hotcoco; what it would accept wrongly, or die of, is refused before.

hotcoco 1.3.0 ends the process for a size that does not fit into memory, and takes runs that end
before the mask does for background. Corpora are full of neither, but one such mask must cost its
annotation and not the build.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hotcoco import mask as coco

MAX_PIXELS = 1 << 26
_LAST_DIGIT = 48 + 63


def decode(rle: Any) -> np.ndarray:
    """bool [H, W] of a COCO RLE `{"size": [H, W], "counts": str | bytes | list}`.

    Raises ValueError for anything that is not one: wrong types, digits out of range, negative
    runs, or runs that do not add up to H * W.
    """
    return np.ascontiguousarray(_decode(rle)).view(bool)


def area(rle: Any) -> tuple[int, tuple[int, int]]:
    """(pixels of the mask, its (H, W)). Raises as `decode`."""
    mask = _decode(rle)
    return int(np.count_nonzero(mask)), mask.shape


def _decode(rle: Any) -> np.ndarray:
    """uint8 [H, W], columns first in memory."""
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError("an RLE needs 'size' and 'counts'")
    size, counts = rle["size"], rle["counts"]
    ok = isinstance(size, list | tuple) and len(size) == 2
    if not ok or not all(type(s) is int and s > 0 for s in size):
        raise ValueError("'size' must be two positive integers [H, W]")
    height, width = size
    if height * width > MAX_PIXELS:
        raise ValueError(f"a mask of {height} x {width} is too large")
    if isinstance(counts, list):
        if not all(type(c) is int and 0 <= c <= MAX_PIXELS for c in counts):
            raise ValueError("'counts' must be non-negative integers")
        _must_fill(sum(counts), height, width)
        return coco.decode({"size": [height, width], "counts": counts})
    text = _text(counts)
    mask = coco.decode({"size": [height, width], "counts": text})
    # whole masks are nearly always written as hotcoco writes them; the others are counted by hand
    if coco.encode(mask)["counts"] != text:
        _must_fill(sum(_runs(text)), height, width)
    return mask


def _text(counts: Any) -> bytes:
    if isinstance(counts, str):
        try:
            counts = counts.encode("ascii")
        except UnicodeEncodeError as error:
            raise ValueError("'counts' holds a character that no RLE has") from error
    if not isinstance(counts, bytes):
        raise ValueError("'counts' must be a string or a list")
    if counts and (max(counts) > _LAST_DIGIT or min(counts) < 48 or (counts[-1] - 48) & 32):
        raise ValueError("'counts' holds a character that no RLE has, or is cut short")
    return counts


def _must_fill(total: int, height: int, width: int) -> None:
    if total != height * width:
        raise ValueError(f"runs do not add up to {height} x {width}")


def _runs(counts: bytes) -> list[int]:
    """Lengths of the runs: base 32 with a sign and a continuation bit, an offset of 48, and from
    the fourth on the difference to the run two before."""
    runs: list[int] = []
    value = place = 0
    for character in counts:
        digit = character - 48
        value |= (digit & 31) << place
        place += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << place
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = place = 0
    return runs
