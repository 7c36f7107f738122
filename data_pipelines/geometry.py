"""From masks to keyframes, boxes and points, and from source pixels to the canvas.

Implements the definitions of section 3.4 and A.1 of the paper: the keyframe is the frame in which
the annotated mask is largest, an option-B frame one in which it is empty, the point the centre of
the largest inscribed circle. Pixels are unit squares, boxes half-open, canvas coordinates rounded
half up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt


def keyframe(union_area_t: np.ndarray) -> int | None:
    """Index of the frame with the largest union area, the first on a tie; None if all are empty.

    union_area_t: integers [T], pixels of the union of an expression's objects in each frame.
    """
    if union_area_t.size == 0 or union_area_t.max() <= 0:
        return None
    return int(np.argmax(union_area_t))


def empty_frames(union_area_t: np.ndarray) -> np.ndarray:
    """Indices of the frames that may be shown as option B: those of zero union area."""
    return np.flatnonzero(union_area_t == 0)


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """[x_min, y_min, x_max + 1, y_max + 1] in the mask's pixels.

    mask: bool [H, W], not empty (ValueError).
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if columns.size == 0:
        raise ValueError("an empty mask has no box")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def inscribed_pixel(mask: np.ndarray) -> tuple[int, int]:
    """(x, y) of the pixel farthest from the background, the first in row-major order on a tie.

    The outside of the image is background. Distances are Euclidean between pixel centres and
    compared by their exact squares, so that ties are true ties. mask: bool [H, W], not empty.
    """
    return _inscribed(mask, tight_box(mask))


def _inscribed(mask: np.ndarray, box: tuple[int, int, int, int]) -> tuple[int, int]:
    x1, y1, x2, y2 = box
    # Beyond the tight box all is background, so one pixel of margin decides every distance.
    padded = np.pad(mask[y1:y2, x1:x2], 1)
    y, x = _farthest(padded)
    return x - 1 + x1, y - 1 + y1


_EXACT_SIDE = 1400
"""Up to here OpenCV's float32 distances, squared and rounded, are the exact integers."""


def _farthest(mask: np.ndarray) -> tuple[int, int]:
    """(y, x) of the pixel farthest from the background, the first on a tie.

    mask: bool [H, W] with background on every side.
    """
    if max(mask.shape) > _EXACT_SIDE:
        y, x = np.unravel_index(int(np.argmax(_squared_distances(mask))), mask.shape)
        return int(y), int(x)
    image = np.ascontiguousarray(mask).view(np.uint8)
    distance = cv2.distanceTransform(image, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    largest = float(distance.max())
    square = round(largest**2)
    # Only these can round to the largest square: squares are integers.
    ys, xs = np.nonzero(distance > math.sqrt(max(square - 1, 0)))
    near = np.rint(distance[ys, xs].astype(np.float64) ** 2)
    first = int(np.flatnonzero(near == square)[0])
    return int(ys[first]), int(xs[first])


def _squared_distances(mask: np.ndarray) -> np.ndarray:
    """int64 [H, W]: squared Euclidean distance of each pixel to the nearest background pixel.

    mask: bool [H, W] with background on every side.
    """
    nearest_y, nearest_x = distance_transform_edt(mask, return_distances=False, return_indices=True)
    rows = np.arange(mask.shape[0], dtype=np.int64)[:, None]
    columns = np.arange(mask.shape[1], dtype=np.int64)[None, :]
    return (nearest_y - rows) ** 2 + (nearest_x - columns) ** 2


def scale_half_up(value: int | Fraction, size: int, canvas: int) -> int:
    """`value * canvas / size`, rounded half up, in exact arithmetic.

    value: source pixels, in halves at most; size: the source's width or height; canvas: its side.
    """
    doubled = int(2 * value)
    # floor(v * c / s + 1/2) with v = doubled / 2.
    return (doubled * canvas + size) // (2 * size)


@dataclass(frozen=True)
class Grounding:
    """What the policy is to say of one object, in pixels of the canvas."""

    bbox_2d: tuple[int, int, int, int]
    point_2d: tuple[int, int]

    def as_dict(self) -> dict[str, list[int]]:
        """The item of an answer or ground truth."""
        return {"bbox_2d": list(self.bbox_2d), "point_2d": list(self.point_2d)}


def box_on_canvas(
    box: tuple[int, int, int, int], size: tuple[int, ...], canvas: int
) -> tuple[int, int, int, int]:
    """A box of source pixels, in a frame of (H, W), in canvas pixels."""
    height, width = size
    x1, y1, x2, y2 = box
    return (
        scale_half_up(x1, width, canvas),
        scale_half_up(y1, height, canvas),
        scale_half_up(x2, width, canvas),
        scale_half_up(y2, height, canvas),
    )


def ground(mask: np.ndarray, canvas: int) -> Grounding:
    """Box and point of one object's mask (bool [H, W], not empty) in canvas pixels."""
    height, width = mask.shape
    box = tight_box(mask)
    x, y = _inscribed(mask, box)
    half = Fraction(1, 2)
    point = (scale_half_up(x + half, width, canvas), scale_half_up(y + half, height, canvas))
    return Grounding(box_on_canvas(box, mask.shape, canvas), point)


PIXELS = 2
"""Raised whenever `to_canvas` gives other pixels: shards made before are then made anew."""
_SMALL = 1 << 18
"""Pixels of a frame that is averaged over areas."""


def to_canvas(frame: np.ndarray, canvas: int) -> np.ndarray:
    """The frame as the policy sees it: uint8 [H, W, 3] to uint8 [canvas, canvas, 3].

    A side that grows is interpolated linearly. One that shrinks is averaged over areas in small
    frames. OpenCV takes longer for that than for decoding a large one, so these are smoothed, by a
    Gaussian of (ratio - 1) / 2 pixels, and interpolated: at 840 as close to an antialiased bicubic
    (within a decibel) at a quarter of the time. Shards and inference must use this one function:
    other kernels shift edges.
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
    """Against aliasing. Up to a ratio of 1.6 linear interpolation looks at every pixel closely
    enough."""
    sigmas = [(side / canvas - 1) / 2 for side in frame.shape[1::-1]]
    sigma_x, sigma_y = (sigma if sigma > 0.3 else 0.0 for sigma in sigmas)
    if not sigma_x and not sigma_y:
        return frame
    kernel = (2 * math.ceil(3 * sigma_x) + 1, 2 * math.ceil(3 * sigma_y) + 1)
    # a sigma of 0 would mean that OpenCV chooses one; a kernel one pixel wide ignores it
    return cv2.GaussianBlur(
        frame, kernel, sigma_x or 1.0, sigmaY=sigma_y or 1.0, borderType=cv2.BORDER_REPLICATE
    )
