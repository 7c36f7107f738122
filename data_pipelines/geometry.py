"""Keyframes, boxes and points from masks, and the scaling from source pixels to the canvas.

Implements the definitions of section 3.4 and A.1 of the paper: the keyframe is the frame with the
largest annotated mask, an option-B frame has an empty mask, the point is the centre of the largest
inscribed circle. Pixels are unit squares, boxes are half-open, canvas coordinates are rounded half
up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt


def keyframe(union_area_t: np.ndarray) -> int | None:
    """Return the index of the frame with the largest union area; None if all are empty.

    Ties go to the earliest frame.

    Args:
        union_area_t: integers [T], pixels of the union of an expression's objects in each frame.
    """
    if union_area_t.size == 0 or union_area_t.max() <= 0:
        return None
    return int(np.argmax(union_area_t))


def empty_frames(union_area_t: np.ndarray) -> np.ndarray:
    """Return the indices of the frames that can be shown as option B: those with zero area."""
    return np.flatnonzero(union_area_t == 0)


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the half-open box [x_min, y_min, x_max + 1, y_max + 1] of a mask, in its pixels.

    Args:
        mask: bool [H, W], not empty.
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if columns.size == 0:
        raise ValueError("an empty mask has no box")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def mask_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two masks of one shape; 1 if both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def inscribed_pixel(
    mask: np.ndarray, box: tuple[int, int, int, int] | None = None
) -> tuple[int, int]:
    """Return (x, y) of the mask's pixel that is farthest from the background.

    Pixels outside the image are background. Distances are Euclidean between pixel centres and
    compared by their exact squares. Ties go to the first pixel in row-major order.

    Args:
        mask: bool [H, W], not empty.
        box: The mask's tight box, if it is known.
    """
    x1, y1, x2, y2 = tight_box(mask) if box is None else box
    # everything beyond the tight box is background: a margin of one pixel decides every distance
    padded = np.pad(mask[y1:y2, x1:x2], 1)
    y, x = _farthest(padded)
    return x - 1 + x1, y - 1 + y1


_EXACT_SIDE = 1400
"""Longest side for which OpenCV's float32 distances, squared and rounded, are exact integers."""


def _farthest(mask: np.ndarray) -> tuple[int, int]:
    """Return (y, x) of the pixel farthest from the background; ties go to the first.

    Args:
        mask: bool [H, W] with background on every side.
    """
    if max(mask.shape) > _EXACT_SIDE:
        y, x = np.unravel_index(int(np.argmax(_squared_distances(mask))), mask.shape)
        return int(y), int(x)
    image = np.ascontiguousarray(mask).view(np.uint8)
    distance = cv2.distanceTransform(image, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    largest = float(distance.max())
    square = round(largest**2)
    # squares are integers, so only these pixels can round to the largest one
    ys, xs = np.nonzero(distance > math.sqrt(max(square - 1, 0)))
    near = np.rint(distance[ys, xs].astype(np.float64) ** 2)
    first = int(np.flatnonzero(near == square)[0])
    return int(ys[first]), int(xs[first])


def _squared_distances(mask: np.ndarray) -> np.ndarray:
    """Return int64 [H, W]: squared Euclidean distance of each pixel to the nearest background.

    Args:
        mask: bool [H, W] with background on every side.
    """
    nearest_y, nearest_x = distance_transform_edt(mask, return_distances=False, return_indices=True)
    rows = np.arange(mask.shape[0], dtype=np.int64)[:, None]
    columns = np.arange(mask.shape[1], dtype=np.int64)[None, :]
    return (nearest_y - rows) ** 2 + (nearest_x - columns) ** 2


def scale_half_up(value: int | Fraction, size: int, canvas: int) -> int:
    """Return `value * canvas / size`, rounded half up, in exact arithmetic.

    Args:
        value: Source pixels, in whole or half pixels.
        size: Width or height of the source frame in pixels.
        canvas: Side of the canvas in pixels.
    """
    doubled = int(2 * value)
    # floor(v * c / s + 1/2) with v = doubled / 2
    return (doubled * canvas + size) // (2 * size)


@dataclass(frozen=True)
class ObjectTruth:
    """Ground truth of one object, in canvas pixels."""

    bbox_2d: tuple[int, int, int, int]
    point_2d: tuple[int, int]

    def as_dict(self) -> dict[str, list[int]]:
        """Return the object's item in an answer or ground truth."""
        return {"bbox_2d": list(self.bbox_2d), "point_2d": list(self.point_2d)}


def box_on_canvas(
    box: tuple[int, int, int, int], size: tuple[int, ...], canvas: int
) -> tuple[int, int, int, int]:
    """Convert a box in pixels of an [H, W] frame to canvas pixels."""
    height, width = size
    x1, y1, x2, y2 = box
    return (
        scale_half_up(x1, width, canvas),
        scale_half_up(y1, height, canvas),
        scale_half_up(x2, width, canvas),
        scale_half_up(y2, height, canvas),
    )


def ground(mask: np.ndarray, canvas: int) -> ObjectTruth:
    """Return box and point of one object's mask (bool [H, W], not empty) in canvas pixels."""
    height, width = mask.shape
    box = tight_box(mask)
    x, y = inscribed_pixel(mask, box)
    half = Fraction(1, 2)
    point = (scale_half_up(x + half, width, canvas), scale_half_up(y + half, height, canvas))
    return ObjectTruth(box_on_canvas(box, mask.shape, canvas), point)


PIXELS = 2
"""Version of `to_canvas`: increased whenever its output changes, so that shards are rebuilt."""
_SMALL = 1 << 18
"""Frames of up to this many pixels are shrunk by area averaging."""


def to_canvas(frame: np.ndarray, canvas: int) -> np.ndarray:
    """Resize a frame to what the policy sees: uint8 [H, W, 3] to uint8 [canvas, canvas, 3].

    A side that grows is interpolated linearly. A side that shrinks is area-averaged in small
    frames. In large frames OpenCV's area averaging takes longer than decoding, so they are smoothed
    by a Gaussian of (ratio - 1) / 2 pixels and interpolated: at 840 this is as close to an
    antialiased bicubic (within a decibel) at a quarter of the time. Shards and inference must both
    use this function: other kernels shift edges.
    """
    height, width = frame.shape[:2]
    if height * width <= _SMALL:
        shrunk = (min(width, canvas), min(height, canvas))
        if shrunk != (width, height):
            frame = cv2.resize(frame, shrunk, interpolation=cv2.INTER_AREA)
    else:
        frame = _smooth(frame, canvas)
    if frame.shape[:2] != (canvas, canvas):
        frame = cv2.resize(frame, (canvas, canvas), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(frame)


def _smooth(frame: np.ndarray, canvas: int) -> np.ndarray:
    """Smooth against aliasing; at ratios up to 1.6 linear interpolation alone is good enough."""
    sigmas = [(side / canvas - 1) / 2 for side in frame.shape[1::-1]]
    sigma_x, sigma_y = (sigma if sigma > 0.3 else 0.0 for sigma in sigmas)
    if not sigma_x and not sigma_y:
        return frame
    kernel = (2 * math.ceil(3 * sigma_x) + 1, 2 * math.ceil(3 * sigma_y) + 1)
    # OpenCV replaces a sigma of 0 by its own choice; a kernel one pixel wide ignores the sigma
    return cv2.GaussianBlur(
        frame, kernel, sigma_x or 1.0, sigmaY=sigma_y or 1.0, borderType=cv2.BORDER_REPLICATE
    )
