"""COCO run-length masks, decoded by hotcoco after a strict check.

hotcoco 1.3.0 aborts the process for a size that does not fit into memory, and pads runs that end
too early with background. Such masks are rare, but one of them must cost its annotation only, not
the build. Areas and boxes are computed from the runs, without decoding pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from hotcoco import mask as coco

MAX_PIXELS = 1 << 26
"""Larger masks and label images are refused."""
_DIGITS = bytes(range(48, 48 + 64))
_LAST_OF_RUN = _DIGITS[:32]
"""Digits that end a run; the others continue it."""


def decode(rle: Any) -> np.ndarray:
    """Decode a COCO RLE `{"size": [H, W], "counts": str | bytes | list}` to bool [H, W].

    Raises:
        ValueError: Wrong types, digits out of range, negative runs, or runs that do not add up to
            H * W.
    """
    columns = coco.decode(_checked(rle))
    # OpenCV transposes several times faster than numpy
    return cv2.transpose(columns.T).view(bool)


def area(rle: Any) -> tuple[int, tuple[int, int]]:
    """Return (pixels of the mask, its (H, W)); ValueError as `decode`."""
    checked = _checked(rle)
    height, width = checked["size"]
    return int(coco.area(checked)), (height, width)


def box(rle: Any) -> tuple[tuple[int, int, int, int] | None, tuple[int, int]]:
    """Return (half-open box [x1, y1, x2, y2] or None if empty, (H, W)); ValueError as `decode`."""
    checked = _checked(rle)
    height, width = checked["size"]
    x, y, w, h = (int(v) for v in coco.to_bbox(checked))
    return ((x, y, x + w, y + h) if w else None), (height, width)


def union_area(rles: Sequence[Any]) -> int:
    """Return the pixels of the union of masks of one size; ValueError as `decode`."""
    return int(coco.area(coco.merge([_checked(rle) for rle in rles])))


def _checked(rle: Any) -> dict[str, Any]:
    """Return an equal RLE that hotcoco reads safely."""
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError("an RLE needs 'size' and 'counts'")
    size, counts = rle["size"], rle["counts"]
    ok = isinstance(size, list | tuple) and len(size) == 2
    if not ok or not all(type(s) is int and s > 0 for s in size):
        raise ValueError("'size' must be two positive integers [H, W]")
    height, width = size
    if max(height, width) > MAX_PIXELS or height * width > MAX_PIXELS:
        raise ValueError("a mask larger than any image")
    if isinstance(counts, list):
        if not all(type(c) is int and 0 <= c <= MAX_PIXELS for c in counts):
            raise ValueError("'counts' must be non-negative integers")
        fills = sum(counts) == height * width
    else:
        counts = _text(counts)
        fills = _total_is(counts, height * width)
    if not fills:
        raise ValueError(f"runs do not add up to {height} x {width}")
    return {"size": [height, width], "counts": counts}


def _text(counts: Any) -> bytes:
    if isinstance(counts, str):
        try:
            counts = counts.encode("ascii")
        except UnicodeEncodeError as error:
            raise ValueError("'counts' holds an invalid character") from error
    if not isinstance(counts, bytes):
        raise ValueError("'counts' must be a string or a list")
    if not counts:
        raise ValueError("'counts' is empty")
    if counts.translate(None, _DIGITS):
        raise ValueError("'counts' holds an invalid character")
    if counts[-1] not in _LAST_OF_RUN:
        raise ValueError("'counts' is truncated")
    return counts


def _total_is(counts: bytes, pixels: int) -> bool:
    """Return True if the runs add up to `pixels`; ValueError if they exceed it or are malformed.

    hotcoco only detects runs that exceed a size, so it is called with two sizes; that is an order
    of magnitude faster than parsing the runs here.
    """
    text = counts.decode("ascii")
    coco.rle_from_string(text, pixels, 1)
    try:
        coco.rle_from_string(text, pixels - 1, 1)
    except ValueError:
        return True
    return False
