"""Masks, boxes and points drawn over a frame, as SVG in pixels of the frame.

Line widths do not depend on the frame's resolution or on the size at which it is shown. Each shape
has the class `mark` and the name of its kind, so that a page can hide one kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rcot_rl.monitoring.pages.page import text
from rcot_rl.monitoring.run_files.marks import BOX, EDGE, POINT, PREDICTED

MARK_KINDS = {
    "truth": "ground truth",
    "predicted": "predicted mask",
    "box": "predicted box",
    "point": "predicted point",
}
"""Kinds of marks, with their names in a legend."""

UNITS = 360
"""Points have the radius that is 4 on a drawing that is `UNITS` wide."""

_TOLERANCE = 0.3
"""Largest distance of a simplified outline, on a drawing that is `UNITS` wide."""


class Overlay:
    """What is drawn over one frame, in pixels: half-open boxes [x1, y1, x2, y2], points [x, y]."""

    def __init__(self, width: int, height: int) -> None:
        self._limits = np.array([width, height], dtype=float)
        self._shapes: list[str] = []

    def outline(self, mask: np.ndarray, colour: str, kind: str = "", dashed: bool = False) -> None:
        """Draw the outline of a mask (bool [H, W]) along the edges of its pixels."""
        if not mask.any():
            return
        lines = "".join(_path(line) for line in self._contours(mask))
        self._stroke(f'<path d="{lines}"', colour, kind, dashed)

    def boxes(
        self, boxes: Sequence[Sequence[float]], colour: str, kind: str = "", dashed: bool = False
    ) -> None:
        """Draw boxes, cut at the frame; boxes without area are left out."""
        for box in boxes:
            (x1, y1), (x2, y2) = np.clip(np.reshape(box, (2, 2)), 0, self._limits)
            if x2 > x1 and y2 > y1:
                place = f'x="{_n(x1)}" y="{_n(y1)}" width="{_n(x2 - x1)}" height="{_n(y2 - y1)}"'
                self._stroke(f"<rect {place}", colour, kind, dashed)

    def points(self, points: Sequence[Sequence[float]], colour: str, kind: str = "") -> None:
        """Draw points, moved to the edge of the frame if they lie outside."""
        radius = 4 * self._limits[0] / UNITS
        for point in points:
            x, y = np.clip(np.asarray(point, dtype=float), 0, self._limits)
            self._shapes.append(
                f'<circle class="mark {kind}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" '
                f'fill="{colour}" stroke="{EDGE}" vector-effect="non-scaling-stroke"/>'
            )

    def html(self, picture: str, alt: str) -> str:
        """Return the drawing over `picture`, a data URI."""
        svg = f'<svg {self._view} aria-hidden="true">{"".join(self._shapes)}</svg>'
        return f'<div class="frame"><img src="{picture}" alt="{text(alt)}">{svg}</div>'

    def svg(self, frame: str, alt: str = "") -> str:
        """Return the drawing over a frame.

        Args:
            frame: The frame's id in a `FrameSheet` of the page.
            alt: Alternative text; empty for a decoration.
        """
        width, height = self._limits
        role = f'role="img" aria-label="{text(alt)}"' if alt else 'aria-hidden="true"'
        return (
            f'<svg class="marks" {self._view} {role}>'
            f'<use href="#{frame}" width="{_n(width)}" height="{_n(height)}"/>'
            f"{''.join(self._shapes)}</svg>"
        )

    @property
    def _view(self) -> str:
        width, height = self._limits
        return f'viewBox="0 0 {_n(width)} {_n(height)}"'

    def _stroke(self, shape: str, colour: str, kind: str, dashed: bool) -> None:
        """Add an outlined shape; a dashed one lies on a continuous dark line."""
        classes = f'class="mark {kind}" fill="none" vector-effect="non-scaling-stroke"'
        if dashed:
            self._shapes.append(f'{shape} {classes} stroke="{EDGE}" stroke-width="3"/>')
        dashes = ' stroke-dasharray="5 3"' if dashed else ""
        self._shapes.append(f'{shape} {classes} stroke="{colour}" stroke-width="2"{dashes}/>')

    def _contours(self, mask: np.ndarray) -> list[np.ndarray]:
        """Return closed lines [N, 2] along the edges of the mask's pixels, simplified."""
        # contourpy traces contours for matplotlib, which requires it
        import cv2
        from contourpy import contour_generator

        height, width = mask.shape
        # pixel centres lie at halves; the padding closes outlines at the border of the frame
        xs, ys = np.arange(-0.5, width + 1), np.arange(-0.5, height + 1)
        lines: Any = contour_generator(xs, ys, np.pad(mask.astype(float), 1)).lines(0.5)
        tolerance = float(_TOLERANCE * self._limits[0] / UNITS)
        closed = [np.asarray(line[:-1], np.float32) for line in lines]
        return [cv2.approxPolyDP(line, tolerance, True)[:, 0] for line in closed]


def marks_legend(kinds: Iterable[str]) -> str:
    """Return check boxes that show and hide marks of some `MARK_KINDS` in the same section."""
    boxes = "".join(
        f'<label><input type="checkbox" class="show-{kind}" checked>'
        f'<span class="swatch {kind}"></span>{MARK_KINDS[kind]}</label>'
        for kind in kinds
    )
    return f'<fieldset class="legend"><legend>Show</legend>{boxes}</fieldset>'


def _path(line: np.ndarray) -> str:
    return "M" + " ".join(f"{_n(x)} {_n(y)}" for x, y in line) + "Z"


def _n(value: float) -> str:
    return f"{round(float(value), 2):g}"


_HIDE = ",\n".join(f"section:has(.show-{kind}:not(:checked)) .mark.{kind}" for kind in MARK_KINDS)

MARKS_STYLE = f"""\
.sheet {{ position: absolute; width: 0; height: 0; }}
.marks {{ border-radius: 4px; background: var(--line); overflow: hidden; }}
{_HIDE} {{ display: none; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 4px 16px; border: 0; padding: 0; margin: 8px 0;
  font-size: 13px; color: var(--soft); }}
.legend legend {{ float: left; padding: 0; }}
.legend label {{ display: flex; align-items: center; gap: 5px; cursor: pointer; }}
.legend input {{ margin: 0; accent-color: var(--s1); }}
.legend .swatch {{ margin: 0; }}
.swatch.predicted {{ border-color: {PREDICTED}; }}
.swatch.box {{ border-color: {BOX}; }}
.swatch.point {{ background: {POINT}; outline: 1px solid {EDGE}; }}
"""
"""Style of the drawings and their legend."""
