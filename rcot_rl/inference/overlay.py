"""Overlays: masks, boxes and points drawn on frames."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

MASK_COLOR = (255, 64, 64)
BOX_COLOR = (64, 255, 64)
POINT_COLOR = (255, 255, 0)
OPACITY = 0.5


def draw_overlay(
    frame: np.ndarray,
    mask: np.ndarray,
    boxes: Sequence[Sequence[float]] = (),
    points: Sequence[Sequence[float]] = (),
) -> np.ndarray:
    """Draw a tinted and outlined mask, boxes and points on a copy of a frame.

    Args:
        frame: uint8 `[H, W, 3]` RGB.
        mask: bool `[H, W]`.
        boxes: [x1, y1, x2, y2], half-open, in pixels of the frame.
        points: [x, y] in pixels of the frame.
    """
    if mask.shape != frame.shape[:2]:
        raise ValueError(f"mask {mask.shape} on a frame {frame.shape[:2]}")
    drawn = frame.copy()
    tint = (1 - OPACITY) * frame[mask].astype(np.float32) + OPACITY * np.array(MASK_COLOR)
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
