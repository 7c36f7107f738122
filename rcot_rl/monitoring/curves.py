"""Line charts as inline SVG: a run's curves without a plotting library, in the page's own colours.

Colours are CSS classes (`s1` … `s6`) that the page defines for light and for dark; text takes the
page's. Each step is a thin line, a centred running mean the thick one. Left out: anything that
moves; numbers can be had from metrics.jsonl.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 24
_POINTS = 400
"""Most points of a line; longer curves are drawn as the means of stretches of equal length."""

COLOURS = 6


@dataclass(frozen=True)
class Series:
    """One curve; values that are not finite are gaps."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def line_chart(title: str, series: Sequence[Series], note: str = "") -> str:
    """A figure with title, latest values and axes; up to six curves share the axes.

    note: one line on how to read it. Names and note are escaped here. Raises ValueError
    for curves of unequal lengths, for more than six, and where there is no finite value at all.
    """
    if len(series) > COLOURS:
        raise ValueError(f"{len(series)} curves in one chart; {COLOURS} at most")
    curves = [_finite(one) for one in series]
    if not any(curves):
        raise ValueError(f"{title}: nothing to draw")
    x_ticks, y_ticks = (ticks([p[axis] for curve in curves for p in curve]) for axis in (0, 1))
    scale = _Scale(x_ticks, y_ticks)
    drawn = [_axes(scale)]
    for number, curve in enumerate(curves, start=1):
        drawn.append(_curve(scale, curve, f"s{number}"))
    legend = "".join(
        f'<span class="key s{number}">{html.escape(one.name)} <b>{_latest(one)}</b></span>'
        for number, one in enumerate(series, start=1)
    )
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}<span class="keys">{legend}</span>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(drawn)}</svg>'
        f"{f'<small>{html.escape(note)}</small>' if note else ''}</figure>"
    )


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window of an odd size, which is cut at the ends to stay centred."""
    half = window // 2
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        part = values[i - reach : i + reach + 1]
        means.append(sum(part) / len(part))
    return means


def ticks(values: Sequence[float], about: int = 4) -> list[float]:
    """Round numbers, evenly spaced, from below the smallest value to above the largest."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    # Halves, since the difference of two large numbers may be too large for a float.
    rough = (high / 2 - low / 2) / about * 2
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def label(value: float) -> str:
    """A number for people: three or four digits."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e5):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    text = f"{value:.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def labels(ticks_: Sequence[float]) -> list[str]:
    """Ticks for people: as many decimals as their step needs."""
    short = [label(value) for value in ticks_]
    largest, step = max(map(abs, ticks_)), ticks_[1] - ticks_[0]
    if all(
        abs(float(name) - value) < 0.05 * step for name, value in zip(short, ticks_, strict=True)
    ):
        return short
    digits = math.ceil(math.log10(largest / step)) + 1
    return [f"{value:.{min(digits, 12)}g}" for value in ticks_]


class _Scale:
    """From values to the drawing's coordinates."""

    def __init__(self, x_ticks: list[float], y_ticks: list[float]) -> None:
        self.x_ticks, self.y_ticks = x_ticks, y_ticks

    def x(self, value: float) -> float:
        first, last = self.x_ticks[0], self.x_ticks[-1]
        return _LEFT + (value - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        first, last = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - _BOTTOM - (value - first) / (last - first) * (HEIGHT - _TOP - _BOTTOM)


def _finite(series: Series) -> list[tuple[float, float]]:
    pairs = zip(series.steps, series.values, strict=True)
    points = [(float(x), float(y)) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
    size = _stretch(len(points))
    if size <= 1:
        return points
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def _latest(series: Series) -> str:
    """Of the curve itself, not of a stretch's mean."""
    last = next((y for y in reversed(series.values) if math.isfinite(y)), None)
    return "–" if last is None else label(last)


def _axes(scale: _Scale) -> str:
    parts = []
    for value, name in zip(scale.y_ticks, labels(scale.y_ticks), strict=True):
        y = scale.y(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{name}</text>'
        )
    for value in scale.x_ticks:
        parts.append(
            f'<text x="{scale.x(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{label(value)}</text>"
        )
    return "".join(parts)


def _curve(scale: _Scale, points: list[tuple[float, float]], colour: str) -> str:
    if not points:
        return ""
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="{colour} dot" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3"/>'
    window = window_of(len(points))
    means = running_mean([y for _, y in points], window)
    smooth = [(x, y) for (x, _), y in zip(points, means, strict=True)]
    thin = f'<path class="{colour} thin" d="{_path(scale, points)}"/>' if window > 1 else ""
    return f'{thin}<path class="{colour} line" d="{_path(scale, smooth)}"/>'


def _stretch(n: int) -> int:
    """Steps that one point of a curve of n steps stands for."""
    return -(-n // _POINTS)


def how_drawn(n: int) -> str:
    """How a curve of n steps is to be read."""
    size = max(1, _stretch(n))
    window = window_of(-(-n // size)) * size
    thin = "each step" if size == 1 else f"means of {size} steps"
    return f"Thin: {thin}; thick: running mean of {window} steps."


def window_of(n: int) -> int:
    """Points of the running mean for a curve of n points: about an eighth, odd, 15 at most."""
    return min(15, n // 8 // 2 * 2 + 1)


def _path(scale: _Scale, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{scale.x(x):.1f} {scale.y(y):.1f}" for x, y in points)
