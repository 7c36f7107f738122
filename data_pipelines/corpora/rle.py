"""COCO run-length masks, by hotcoco; what it would accept wrongly, or die of, is refused before.

hotcoco 1.3.0 ends the process for a size that does not fit into memory, and takes runs that end
before the mask does for background. Corpora are full of neither, but one such mask must cost its
annotation and not the build. Areas and boxes are taken from the runs, without a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from hotcoco import mask as coco

MAX_PIXELS = 1 << 26
_DIGITS = bytes(range(48, 48 + 64))
_LAST_OF_RUN = _DIGITS[:32]
"""The others say that their run goes on."""


def decode(rle: Any) -> np.ndarray:
    """bool [H, W] of a COCO RLE `{"size": [H, W], "counts": str | bytes | list}`.

    Raises ValueError for anything that is not one: wrong types, digits out of range, negative
    runs, or runs that do not add up to H * W.
    """
    columns = coco.decode(_checked(rle))
    # OpenCV turns columns into rows several times faster than numpy
    return cv2.transpose(columns.T).view(bool)


def area(rle: Any) -> tuple[int, tuple[int, int]]:
    """(pixels of the mask, its (H, W)). Raises as `decode`."""
    checked = _checked(rle)
    height, width = checked["size"]
    return int(coco.area(checked)), (height, width)


def box(rle: Any) -> tuple[tuple[int, int, int, int] | None, tuple[int, int]]:
    """(half-open [x1, y1, x2, y2] in pixels, None of an empty mask; its (H, W)). Raises as
    `decode`."""
    checked = _checked(rle)
    height, width = checked["size"]
    x, y, w, h = (int(v) for v in coco.to_bbox(checked))
    return ((x, y, x + w, y + h) if w else None), (height, width)


def union_area(rles: Sequence[Any]) -> int:
    """Pixels of the union of masks of one size. Raises as `decode`."""
    return int(coco.area(coco.merge([_checked(rle) for rle in rles])))


def _checked(rle: Any) -> dict[str, Any]:
    """The same RLE, which hotcoco will read without harm."""
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
            raise ValueError("'counts' holds a character that no RLE has") from error
    if not isinstance(counts, bytes):
        raise ValueError("'counts' must be a string or a list")
    if not counts:
        raise ValueError("'counts' is empty")
    if counts.translate(None, _DIGITS):
        raise ValueError("'counts' holds a character that no RLE has")
    if counts[-1] not in _LAST_OF_RUN:
        raise ValueError("'counts' is cut short")
    return counts


def _total_is(counts: bytes, pixels: int) -> bool:
    """Whether the runs add up to `pixels`. Raises ValueError when they are more, or broken.

    hotcoco only tells whether they are too many, so it is asked twice: that is an order of
    magnitude faster than reading them here.
    """
    text = counts.decode("ascii")
    coco.rle_from_string(text, pixels, 1)
    try:
        coco.rle_from_string(text, pixels - 1, 1)
    except ValueError:
        return True
    return False
