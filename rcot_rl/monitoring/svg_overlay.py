"""Masks, boxes and points drawn over a frame of a video.

The frame is an embedded picture; what is drawn over it is an SVG of the same shape. Line widths do
not depend on the resolution of the frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from rcot_rl.monitoring.page import text
from rcot_rl.monitoring.svg import inline_svg, new_figure, page_style

WIDTH = 360
"""Width of the drawing in SVG units."""


class Overlay:
    """What is drawn over one frame, in pixels: half-open boxes [x1, y1, x2, y2], points [x, y]."""

    def __init__(self, width: int, height: int) -> None:
        with page_style():
            self._figure = new_figure(WIDTH, WIDTH * height / width)
            self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()
        self._axes.set(xlim=(0, width), ylim=(height, 0))
        self._limits = np.array([width, height], dtype=float)

    def outline(
        self, mask: np.ndarray, colour: str, width: float = 2, style: Literal["-", "--"] = "-"
    ) -> None:
        """Draw the outline of a mask (bool [H, W]) along the edges of its pixels."""
        if not mask.any():
            return
        height, length = mask.shape
        # Pixel centres lie at halves; the padding closes outlines at the border of the frame.
        extent = (-0.5, length + 0.5, -0.5, height + 0.5)
        padded = np.pad(mask.astype(float), 1)
        contour = self._axes.contour(padded, levels=[0.5], extent=extent, colors=[colour])
        contour.set(linewidth=width, linestyle=style, clip_on=False)

    def boxes(self, boxes: Sequence[Sequence[float]], colour: str) -> None:
        """Draw boxes, cut at the frame; boxes without area are left out."""
        from matplotlib.patches import Rectangle

        for box in boxes:
            (x1, y1), (x2, y2) = np.clip(np.reshape(box, (2, 2)), 0, self._limits)
            if x2 > x1 and y2 > y1:
                edges = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour)
                edges.set(linewidth=2, clip_on=False)
                self._axes.add_patch(edges)

    def points(self, points: Sequence[Sequence[float]], colour: str) -> None:
        """Draw points, moved to the edge of the frame if they lie outside."""
        from matplotlib.patches import Circle

        radius = 4 * self._limits[0] / WIDTH
        for point in points:
            x, y = np.clip(np.asarray(point, dtype=float), 0, self._limits)
            dot = Circle((x, y), radius, facecolor=colour, edgecolor="black")
            dot.set(linewidth=1, clip_on=False)
            self._axes.add_patch(dot)

    def html(self, picture: str, alt: str) -> str:
        """Return the drawing over `picture`, a data URI."""
        with page_style():
            drawing = inline_svg(self._figure, "")
        return f'<div class="frame"><img src="{picture}" alt="{text(alt)}">{drawing}</div>'
