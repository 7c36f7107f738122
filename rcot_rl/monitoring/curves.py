"""Line charts of a run's metrics.

The thin line has a point for each step, the thick one is a centred running mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rcot_rl.monitoring.page import LIGHT, text
from rcot_rl.monitoring.svg import inline_svg, new_figure, page_style

WIDTH, HEIGHT = 360, 210
"""Size of a chart in SVG units."""

COLOURS = 6
"""Most curves in one chart."""

_POINTS = 400
"""Most points of a line; longer curves are drawn as the means of stretches of equal length."""


@dataclass(frozen=True)
class Series:
    """One curve; values that are not finite are gaps."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def line_chart(title: str, series: Sequence[Series], note: str = "") -> str:
    """Return an HTML figure: title, latest value of each curve, the chart, and a note.

    Args:
        title: Plain text; escaped here, as the names and the note.
        series: Up to `COLOURS` curves, which share the axes.

    Raises:
        ValueError: for steps and values of unequal lengths, for too many curves, and if no value
            is finite.
    """
    if len(series) > COLOURS:
        raise ValueError(f"{len(series)} curves in one chart; {COLOURS} at most")
    curves = [_points(one) for one in series]
    if not any(curves):
        raise ValueError(f"{title}: nothing to draw")
    keys = "".join(
        f'<span class="key" style="--key: var(--s{number})">{text(one.name)} '
        f"<b>{_latest(one)}</b></span>"
        for number, one in enumerate(series, start=1)
    )
    latest = ", ".join(f"{one.name} {_latest(one)}" for one in series)
    return (
        f'<figure class="chart"><figcaption>{text(title)}<span class="keys">{keys}</span>'
        f"</figcaption>{_drawing(curves, f'{title} by step; at the last step: {latest}')}"
        f"{f'<small>{text(note)}</small>' if note else ''}</figure>"
    )


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over a centred window of odd size, which shrinks at the ends."""
    half = window // 2
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        part = values[i - reach : i + reach + 1]
        means.append(sum(part) / len(part))
    return means


def label(value: float) -> str:
    """Return the number with three or four digits."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e5):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    digits = f"{value:.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3}f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def how_drawn(n: int) -> str:
    """Return how to read a curve of `n` steps."""
    size = max(1, _stretch(n))
    window = window_of(-(-n // size)) * size
    thin = "each step" if size == 1 else f"means of {size} steps"
    return f"Thin: {thin}; thick: running mean of {window} steps."


def window_of(n: int) -> int:
    """Return the window of the running mean of n points: about n / 8, odd, 15 at most."""
    return min(15, n // 8 // 2 * 2 + 1)


def _stretch(n: int) -> int:
    """Return the number of steps per point of a curve of n steps."""
    return -(-n // _POINTS)


def _points(series: Series) -> list[tuple[float, float]]:
    """Return the finite points (step, value), or the means of stretches of a long curve."""
    pairs = zip(series.steps, series.values, strict=True)
    points = [(float(x), float(y)) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
    size = _stretch(len(points))
    if size <= 1:
        return points
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def _latest(series: Series) -> str:
    """Return the last step's own value, not the mean of its stretch."""
    last = next((y for y in reversed(series.values) if math.isfinite(y)), None)
    return "–" if last is None else label(last)


def _ticks(values: Sequence[float], integer: bool) -> Sequence[float]:
    """Return round numbers, evenly spaced, that enclose the values."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    # Halves, because the difference of two large numbers may be too large for a float.
    if high / 2 - low / 2 <= 1e-9 * largest:
        pad = 0.1 * largest or 1.0
        low, high = low - pad, high + pad
    return MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=integer).tick_values(low, high)


def _drawing(curves: Sequence[list[tuple[float, float]]], alt: str) -> str:
    with page_style():
        figure = new_figure(WIDTH, HEIGHT)
        figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
        axes = figure.subplots()
        axes.spines[:].set_visible(False)
        axes.tick_params(left=False, bottom=False)
        axes.grid(axis="y", clip_on=False)
        x_ticks = _ticks([x for points in curves for x, _ in points], integer=True)
        y_ticks = _ticks([y for points in curves for _, y in points], integer=False)
        axes.set(xticks=x_ticks, yticks=y_ticks, xlabel="step")
        axes.set(xlim=(x_ticks[0], x_ticks[-1]), ylim=(y_ticks[0], y_ticks[-1]))
        for number, points in enumerate(curves, start=1):
            colour = LIGHT[f"s{number}"]
            steps, values = [x for x, _ in points], [y for _, y in points]
            window = window_of(len(points))
            if window > 1:
                axes.plot(steps, values, color=colour, alpha=0.35, linewidth=1, clip_on=False)
            if len(points) == 1:  # a line without length, whose round ends are a dot
                axes.plot(steps * 2, values * 2, color=colour, linewidth=6, clip_on=False)
            else:
                means = running_mean(values, window)
                axes.plot(steps, means, color=colour, linewidth=2, clip_on=False)
        return inline_svg(figure, alt)
