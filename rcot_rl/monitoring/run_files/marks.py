"""Colours of what is drawn on frames: the same in the report, in its clips and in trackers."""

from __future__ import annotations

TRUTH = "#ffffff"
"""Ground truth: outlines and boxes, dashed on `EDGE`; point."""

PREDICTED = "#ff3d8b"
"""Predicted mask: its outline and its tint."""

BOX = "#27e0ff"
"""Predicted box."""

POINT = "#ffe14a"
"""Predicted point."""

EDGE = "#000000"
"""Below a light line and around a point, so that both show on any frame."""

TINT = 0.45
"""Share of `PREDICTED` in the pixels of a tinted mask."""


def rgb(colour: str) -> tuple[int, int, int]:
    """Return the red, green and blue (0 to 255) of `#rrggbb`."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue
