"""Masks, boxes and points drawn on frames, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

MASK_COLOR = (255, 64, 64)
BOX_COLOR = (64, 255, 64)
POINT_COLOR = (255, 255, 0)


def overlay(
    frame: np.ndarray,
    mask: np.ndarray,
    boxes: Sequence[Sequence[float]] = (),
    points: Sequence[Sequence[float]] = (),
    *,
    opacity: float = 0.5,
) -> np.ndarray:
    """A copy of `frame` with the mask tinted and outlined, boxes and points on top.

    frame: uint8 [H, W, 3] RGB; mask: bool [H, W]; boxes [x1, y1, x2, y2] and points [x, y] in
    pixels of the frame, half-open. Returns uint8 [H, W, 3].
    """
    if mask.shape != frame.shape[:2]:
        raise ValueError(f"mask {mask.shape} on a frame {frame.shape[:2]}")
    drawn = frame.copy()
    tint = (1 - opacity) * frame[mask].astype(np.float32) + opacity * np.array(MASK_COLOR)
    drawn[mask] = np.rint(tint).astype(np.uint8)
    outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    thickness = max(1, round(min(mask.shape) / 240))
    cv2.drawContours(drawn, outline, -1, MASK_COLOR, thickness)
    for x1, y1, x2, y2 in boxes:
        corner, opposite = (round(x1), round(y1)), (round(x2) - 1, round(y2) - 1)
        cv2.rectangle(drawn, corner, opposite, BOX_COLOR, thickness)
    for x, y in points:
        cv2.circle(drawn, (int(x), int(y)), 2 * thickness, POINT_COLOR, -1)
    return drawn
