"""Matplotlib figures as SVG elements of an HTML page.

Matplotlib is imported by the functions that draw, because the console script imports this package.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from rcot_rl.monitoring.pages.page import LIGHT, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rcot",
    "font.size": 11,
    "text.color": LIGHT["soft"],
    "axes.labelcolor": LIGHT["soft"],
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "grid.color": LIGHT["line"],
    "axes.formatter.useoffset": False,
    "lines.solid_capstyle": "round",
}
_THEMED = ("ink", "soft", "line", "s1", "s2", "s3", "s4", "s5", "s6")
_DECIMALS = re.compile(r"\d+\.\d+")
_UNSUPPORTED = ("use", "image", "clipPath")


@contextmanager
def page_style() -> Iterator[None]:
    """Draw with matplotlib's defaults and the page's settings, not with the user's matplotlibrc."""
    import matplotlib.style

    with matplotlib.style.context(["default", _SETTINGS]):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of `width` x `height` SVG units, without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72))


def inline_svg(figure: Figure, alt: str) -> str:
    """Return the figure as an `<svg>` element that is as wide as its container.

    Only paths and texts are kept: the ids, clip paths and style sheets of several figures would
    clash in one page. Texts use the page's font. Text, grid and curve colours become CSS
    variables, which a dark page redefines. Coordinates are rounded to 0.1 units.

    Args:
        figure: Drawn in `page_style`, with `clip_on=False` and without markers and images.
        alt: Alternative text; empty for an overlay of an image that has its own.

    Raises:
        ValueError: if the figure needs an element that cannot be inlined.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    parts = []
    for element in root.iter():
        name = element.tag.rpartition("}")[2]
        style = _page_colours(element.get("style", ""))
        if name in _UNSUPPORTED:
            raise ValueError(f"<{name}> cannot be inlined; draw without markers, images and clips")
        if name == "path" and style != "fill: none":
            outline = " ".join(_DECIMALS.sub(_rounded, element.get("d", "")).split())
            parts.append(f'<path d="{outline}" style="{style}"/>')
        elif name == "text":
            x, y = (float(element.get(axis, 0)) for axis in "xy")
            content = text("".join(element.itertext()))
            parts.append(f'<text x="{x:.1f}" y="{y:.1f}" style="{style}">{content}</text>')
    role = f'role="img" aria-label="{text(alt)}"' if alt else 'aria-hidden="true"'
    return f'<svg viewBox="{root.get("viewBox")}" {role}>{"".join(parts)}</svg>'


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _page_colours(style: str) -> str:
    style = re.sub(r"font-family:[^;]*;? ?", "", style)
    for name in _THEMED:
        style = style.replace(LIGHT[name], f"var(--{name})")
    return style
