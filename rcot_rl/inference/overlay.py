"""Overlays: masks, boxes, points and the query, drawn on frames so that they show on any colour.

Every line is drawn twice, dark below light, because no single colour shows on all backgrounds. The
colours of objects are those of Okabe and Ito, which colour-blind readers can tell apart. Text is in
DejaVu Sans, which comes with matplotlib and has Latin, Greek, Cyrillic, Arabic and more, but no
Chinese, Japanese or Korean; a character that it lacks is drawn as a box (`missing_glyphs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
)
"""RGB of objects 0, 1, …; from the eighth on they repeat."""
DARK, LIGHT = (0, 0, 0), (255, 255, 255)
KEYFRAME_COLOR = (240, 228, 66)
OPACITY = 0.35
BAND_OPACITY = 0.65
MISSING = "□"
"""Drawn in place of a character that the font lacks."""
MOST_LINES = 3
"""Longer queries are cut with an ellipsis; the trace has the whole query."""
READABLE_SIDE = 360
"""Smaller frames are enlarged by a whole number until their shorter side has so many pixels."""


def readable_scale(height: int, width: int) -> int:
    """Return the factor by which a frame is enlarged, so that lines and text are readable."""
    return max(1, -(-READABLE_SIDE // min(height, width)))


def draw_overlay(
    frame: np.ndarray,
    masks: np.ndarray,
    boxes: Sequence[Sequence[float]] = (),
    points: Sequence[Sequence[float]] = (),
    *,
    label: str = "",
    query: str = "",
    keyframe: bool = False,
    scale: float = 1.0,
) -> np.ndarray:
    """Return a copy of a frame with masks, boxes, points and text.

    Args:
        frame: uint8 `[H, W, 3]` RGB.
        masks: bool `[N, H, W]`, one per object; N may be 0.
        boxes: [x1, y1, x2, y2], half-open, in pixels of the frame; box `i` has the colour of
            object `i`.
        points: [x, y] in pixels of the frame.
        label: Text in the upper left corner.
        query: Text in a band at the bottom.
        keyframe: Draw a border around the frame.
        scale: Enlarges the frame first; lines and text follow the size of the result.

    Returns:
        uint8 `[round(H * scale), round(W * scale), 3]` RGB.
    """
    height, width = frame.shape[:2]
    if masks.shape[1:] != (height, width):
        raise ValueError(f"masks {masks.shape} on a frame {frame.shape[:2]}")
    size = (round(width * scale), round(height * scale))
    drawn = _resized(frame, size).copy()
    thin = max(1, round(min(size) / 360))
    scaled = [_resized(mask.astype(np.float32), size) > 0.5 for mask in masks]
    for index, mask in enumerate(scaled):
        tint = (1 - OPACITY) * drawn[mask] + OPACITY * np.array(_color(index), np.float32)
        drawn[mask] = np.rint(tint).astype(np.uint8)
    for mask in scaled:  # after all tints, so that objects that overlap keep their outlines
        outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outline, -1, DARK, 3 * thin)
        cv2.drawContours(drawn, outline, -1, LIGHT, thin)
    for index, box in enumerate(boxes):
        x1, y1, x2, y2 = (round(edge * scale) for edge in box)
        for color, thickness in ((DARK, 6), (LIGHT, 4), (_color(index), 2)):
            cv2.rectangle(drawn, (x1, y1), (x2 - 1, y2 - 1), color, thickness * thin)
    for index, point in enumerate(points):
        center = (int(point[0] * scale), int(point[1] * scale))
        for color, radius in ((DARK, 7), (LIGHT, 6), (_color(index), 4)):
            cv2.circle(drawn, center, radius * thin, color, -1)
    drawn = draw_captions(drawn, label, query)
    if keyframe:
        _border(drawn, thin)
    return drawn


def draw_captions(image: np.ndarray, label: str = "", text: str = "", size: int = 0) -> np.ndarray:
    """Return a copy of an image with a label in its upper left corner and a text at its bottom.

    Args:
        image: uint8 `[H, W, 3]` RGB.
        size: Height of the font in pixels; 0: a twentieth of the image's shorter side.
    """
    height, width = image.shape[:2]
    size = size or max(10, round(min(height, width) / 20))
    font = ImageFont.truetype(str(_font_file()), size)
    pad, step = size // 2, round(1.25 * size)
    lines = wrap(text, font, width - 2 * pad)
    names = wrap(label, font, width - 2 * pad)[:1]
    band = len(lines) * step + pad if lines else 0
    shaded = image.copy()
    _shade(shaded[height - band :])
    for name in names:
        _shade(shaded[: step + pad, : round(font.getlength(name)) + 2 * pad])
    canvas = Image.fromarray(shaded)
    draw = ImageDraw.Draw(canvas)
    for top, line in (
        *((pad / 2, name) for name in names),
        *((height - band + pad / 2 + i * step, line) for i, line in enumerate(lines)),
    ):
        draw.text((pad, top + step / 2), line, LIGHT, font, anchor="lm")
    return np.array(canvas)


def draw_strip(panels: Sequence[np.ndarray], text: str) -> np.ndarray:
    """Return images of one size side by side, above a text.

    Args:
        panels: uint8 `[H, W, 3]` RGB each; at least one.
    """
    height = len(panels[0])
    gap = np.full((height, 4, 3), LIGHT, np.uint8)
    row = np.hstack([part for panel in panels for part in (gap, panel)][1:])
    size = max(10, height // 14)
    lines = wrap(text, ImageFont.truetype(str(_font_file()), size), row.shape[1] - size)
    band = np.zeros((size + round(1.25 * size) * len(lines), row.shape[1], 3), np.uint8)
    return np.vstack([row, draw_captions(band, text=text, size=size)])


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Return the lines of a text that are at most `width` pixels wide, at most `MOST_LINES`."""
    rest = _drawable(text).split()
    lines: list[str] = []
    while rest and len(lines) < MOST_LINES:
        line = rest.pop(0)
        while rest and font.getlength(f"{line} {rest[0]}") <= width:
            line = f"{line} {rest.pop(0)}"
        fits = len(line)
        while fits > 1 and font.getlength(line[:fits]) > width:
            fits -= 1
        if fits < len(line):  # one word is wider than a line
            rest.insert(0, line[fits:])
        lines.append(line[:fits])
    if rest:
        last = lines[-1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        lines[-1] = f"{last}…"
    return lines


def missing_glyphs(text: str) -> str:
    """Return the distinct characters of a text that are drawn as `MISSING`, in order."""
    known = _glyphs()
    return "".join(dict.fromkeys(c for c in text if not c.isspace() and ord(c) not in known))


def _drawable(text: str) -> str:
    lacking = set(missing_glyphs(text))
    return "".join(MISSING if c in lacking else c for c in text)


@cache
def _font_file() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_file())).get_charmap())


def _color(index: int) -> tuple[int, int, int]:
    return COLORS[index % len(COLORS)]


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return `[H, W, …]` resized to `size` (W, H); smooth when enlarged."""
    if (image.shape[1], image.shape[0]) == size:
        return image
    larger = size[0] > image.shape[1]
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR if larger else cv2.INTER_AREA)


def _border(image: np.ndarray, thin: int) -> None:
    height, width = image.shape[:2]
    for color, inset in ((DARK, 5 * thin), (KEYFRAME_COLOR, 3 * thin)):
        image[:inset] = image[height - inset :] = color
        image[:, :inset] = image[:, width - inset :] = color


def _shade(region: np.ndarray) -> None:
    region[:] = np.rint((1 - BAND_OPACITY) * region).astype(np.uint8)
