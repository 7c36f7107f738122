"""Charts of a run's metrics.

A thin line has a point for each step. A thick line is the mean over a window of steps around each
step, drawn only where the whole window exists, so that its ends are as smooth as its middle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from rcot_rl.monitoring.pages.page import LIGHT, details, text
from rcot_rl.monitoring.pages.svg import inline_svg, new_figure, page_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 360, 176
"""Size of a chart in SVG units."""

COLOURS = 6
"""Most coloured curves in one chart; one more may be grey."""

_POINTS = 400
"""Most points of a line; longer curves are drawn as the means of stretches of equal length."""

_LEAST_SHARE = 0.45
"""Least share of the axis that the data have; a mark that would reduce it is only named."""


@dataclass(frozen=True)
class Series:
    """One curve; values that are not finite are gaps."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float] = ()
    """Standard error of each value, drawn as a band; empty: none."""

    low: Sequence[float] = ()
    high: Sequence[float] = ()
    """Bounds of each value, drawn as a band as they are; empty: none."""

    style: Literal["line", "faint", "smooth", "dots"] = "line"
    """`line`: thin and thick; `faint`: a translucent line; `smooth`: the given values, thick;
    `dots`: dots that a dashed line connects."""

    colour: str = ""
    """A colour variable of the page; empty: the next curve colour."""


class ChartMark(NamedTuple):
    """A horizontal line, such as a reward's maximum or a figure of the paper."""

    value: float
    label: str


class _Point(NamedTuple):
    step: float
    value: float
    error: float


def line_chart(
    title: str,
    series: Sequence[Series],
    meaning: str = "",
    remedy: str = "",
    marks: Sequence[ChartMark] = (),
    span: tuple[float, float] | None = None,
) -> str:
    """Return an HTML figure: title, latest value of each curve, the chart, and how to read it.

    Args:
        title: Plain text; escaped here, as all other texts.
        series: Curves that share the axes.
        meaning: What the chart shows.
        remedy: What to do when it looks wrong, to unfold.
        marks: Horizontal lines. One that would squeeze the curves is named at the edge instead.
        span: Bounds that the y axis never exceeds, such as (0, 100) for a share.

    Raises:
        ValueError: for steps and values of unequal lengths, for too many curves, and if no value
            is finite.
    """
    coloured = [one for one in series if not one.colour]
    if len(coloured) > COLOURS:
        raise ValueError(f"{len(coloured)} curves in one chart; {COLOURS} at most")
    curves = [_points(one) for one in series]
    if not any(curves):
        raise ValueError(f"{title}: nothing to draw")
    colours = [one.colour or f"s{coloured.index(one) + 1}" for one in series]
    keys = "".join(
        f'<span class="key" style="--key: var(--{colour})">{text(one.name)} '
        f"<b>{_latest(one)}</b></span>"
        for one, colour in zip(series, colours, strict=True)
    )
    steps = [point.step for points in curves for point in points]
    alt = f"{title}, steps {label(min(steps))} to {label(max(steps))}. " + "; ".join(
        _spoken(one, points) for one, points in zip(series, curves, strict=True) if points
    )
    alt += "".join(f"; {mark.label}: {label(mark.value)}" for mark in marks)
    drawing, outside = _drawing(series, curves, colours, marks, span, alt)
    keys += "".join(f"<span>{text(name)}</span>" for name in outside)
    return _figure(title, keys, drawing, meaning, remedy)


def dot_chart(
    title: str,
    series: Series,
    axes: tuple[str, str],
    meaning: str = "",
    remedy: str = "",
) -> str:
    """Return an HTML figure of one quantity against another: a dot per step, later ones darker.

    Args:
        title: Plain text; escaped here, as all other texts.
        series: Horizontal positions in `steps`, vertical ones in `values`, in the order of steps.
        axes: Names of the horizontal and of the vertical quantity.
        meaning: What the chart shows.
        remedy: What to do when it looks wrong, to unfold.

    Raises:
        ValueError: if no point is finite.
    """
    points = _finite(series)
    if not points:
        raise ValueError(f"{title}: nothing to draw")
    across, up = ([p.step for p in points], [p.value for p in points])
    alt = (
        f"{title}: {len(points)} steps; first {label(across[0])}, {label(up[0])}; "
        f"last {label(across[-1])}, {label(up[-1])}"
    )
    with page_style():
        figure = new_figure(WIDTH, HEIGHT)
        plot = _axes(figure)
        _bound(plot, "x", across, integer=False)
        _bound(plot, "y", up, integer=False)
        plot.set(xlabel=axes[0])
        for k, (x, y) in enumerate(zip(across, up, strict=True)):
            _dot(plot, x, y, LIGHT["s1"], 5, 0.2 + 0.8 * k / max(1, len(points) - 1))
        drawing = inline_svg(figure, alt)
    keys = f'<span class="key" style="--key: var(--s1)">{text(axes[1])}, upwards</span>'
    return _figure(title, keys, drawing, meaning, remedy)


def window_means(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each `window` neighbours: `len(values) - window + 1` values."""
    return [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]


def label(value: float) -> str:
    """Return the number with three or four digits."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e5):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    digits = f"{value:.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3}f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def how_drawn(n: int, bands: bool) -> str:
    """Return how to read a curve of `n` steps, with or without bands of standard errors."""
    size = max(1, _stretch(n))
    window = window_of(-(-n // size)) * size
    thin = "each step" if size == 1 else f"means of {size} steps"
    if window == size:
        return f"Lines: {thin}."
    return (
        f"Thin line: {thin}. Thick line: mean of the {window} steps around each step, drawn where "
        "all of them exist." + (" Band: ± 1 standard error of the thick line." if bands else "")
    )


def window_of(n: int) -> int:
    """Return the number of points that a smoothed curve of n points averages: about n / 8, odd."""
    return min(15, n // 8 // 2 * 2 + 1)


def _figure(title: str, keys: str, drawing: str, meaning: str, remedy: str) -> str:
    lines = f"<small>{text(meaning)}</small>" if meaning else ""
    lines += f"<small><b>If it looks wrong:</b> {text(remedy)}</small>" if remedy else ""
    return (
        f'<figure class="chart"><figcaption>{text(title)}</figcaption>{drawing}'
        f'<p class="keys">{keys}</p>{details("How to read it", lines) if lines else ""}</figure>'
    )


def _stretch(n: int) -> int:
    """Return the number of steps per point of a curve of n steps."""
    return -(-n // _POINTS)


def _finite(series: Series) -> list[_Point]:
    errors = series.errors or [0.0] * len(series.values)
    triples = zip(series.steps, series.values, errors, strict=True)
    return [
        _Point(float(x), float(y), float(e) if math.isfinite(e) else 0.0)
        for x, y, e in triples
        if math.isfinite(x) and math.isfinite(y)
    ]


def _points(series: Series) -> list[_Point]:
    """Return the finite points, or the means of stretches of a long curve."""
    points = _finite(series)
    size = _stretch(len(points))
    if size <= 1 or series.style in ("smooth", "dots"):
        return points
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [_mean_point(part) for part in parts]


def _mean_point(part: Sequence[_Point]) -> _Point:
    """Return the mean of points; their errors are independent."""
    n = len(part)
    error = math.sqrt(sum((p.error / n) ** 2 for p in part))
    return _Point(sum(p.step for p in part) / n, sum(p.value / n for p in part), error)


def _latest(series: Series) -> str:
    """Return the last step's own value, not the mean of its stretch."""
    last = next((y for y in reversed(series.values) if math.isfinite(y)), None)
    return "–" if last is None else label(last)


def _spoken(series: Series, points: Sequence[_Point]) -> str:
    values = [point.value for point in points]
    return (
        f"{series.name}: first {label(values[0])}, last {_latest(series)}, "
        f"lowest {label(min(values))}, highest {label(max(values))}"
    )


def _axes(figure: object) -> Axes:
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)  # type: ignore[attr-defined]
    plot: Axes = figure.subplots()  # type: ignore[attr-defined]
    plot.spines[:].set_visible(False)
    plot.tick_params(left=False, bottom=False)
    plot.grid(axis="y", clip_on=False)
    return plot


def _bound(plot: Axes, axis: Literal["x", "y"], values: Sequence[float], integer: bool) -> None:
    """End an axis at the lowest and highest value, with round ticks inside."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    # Halves, because the difference of two large numbers may be too large for a float.
    if high / 2 - low / 2 <= 1e-9 * largest:
        pad = 0.5 if integer else 0.1 * largest or 1.0
        low, high = low - pad, high + pad
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=integer).tick_values(low, high)
    margin = 1e-9 * largest
    inside = [tick for tick in ticks if low - margin <= tick <= high + margin]
    plot.set(**{f"{axis}ticks": inside, f"{axis}lim": (low, high)})


def _drawing(
    series: Sequence[Series],
    curves: Sequence[Sequence[_Point]],
    colours: Sequence[str],
    marks: Sequence[ChartMark],
    span: tuple[float, float] | None,
    alt: str,
) -> tuple[str, list[str]]:
    """Return the drawing, and the names of the marks that lie outside."""
    with page_style():
        figure = new_figure(WIDTH, HEIGHT)
        plot = _axes(figure)
        plot.set(xlabel="step")
        _bound(plot, "x", [p.step for points in curves for p in points], integer=True)
        values = [p.value for points in curves for p in points]
        values += [v for one in series for v in (*one.low, *one.high) if math.isfinite(v)]
        drawn = _bound_values(plot, values, [mark.value for mark in marks], span)
        for one, points, colour in zip(series, curves, colours, strict=True):
            _draw(plot, one, points, LIGHT[colour])
        shown = [mark for mark, fits in zip(marks, drawn, strict=True) if fits]
        _draw_marks(plot, shown)
        top = plot.get_ylim()[1]
        outside = [
            f"{mark.label} {label(mark.value)} {'↑' if mark.value > top else '↓'}"
            for mark, fits in zip(marks, drawn, strict=True)
            if not fits
        ]
        return inline_svg(figure, alt), outside


def _bound_values(
    plot: Axes,
    values: Sequence[float],
    marks: Sequence[float],
    span: tuple[float, float] | None,
) -> list[bool]:
    """Bound the y axis, and return which marks are inside."""
    low, high = min(values), max(values)
    pad = 0.05 * (high / 2 - low / 2) * 2
    ends = [low - pad, high + pad]
    if span is not None:
        ends = [max(ends[0], min(span[0], low)), min(ends[1], max(span[1], high))]
    inside = []
    for mark in marks:
        reach = [min(ends[0], mark - pad), max(ends[1], mark + pad)]
        fits = high / 2 - low / 2 >= _LEAST_SHARE * (reach[1] / 2 - reach[0] / 2)
        inside.append(fits and math.isfinite(mark))
        if inside[-1]:
            ends = reach
    _bound(plot, "y", ends, integer=False)
    return inside


def _draw(plot: Axes, series: Series, points: Sequence[_Point], colour: str) -> None:
    if not points:
        return
    steps, values = [p.step for p in points], [p.value for p in points]
    if series.low and series.high:
        _band(plot, series.steps, series.low, series.high, colour)
    if series.style == "dots":
        plot.plot(steps, values, color=colour, linewidth=1.2, dashes=(4, 4), clip_on=False)
        for x, y in zip(steps, values, strict=True):
            _dot(plot, x, y, colour, 7)
        return
    if len(points) == 1:
        _dot(plot, steps[0], values[0], colour, 6)
        return
    if series.style == "faint":
        plot.plot(steps, values, color=colour, alpha=0.55, linewidth=1.2, clip_on=False)
        return
    window = 1 if series.style == "smooth" else window_of(len(points))
    if window > 1:
        plot.plot(steps, values, color=colour, alpha=0.35, linewidth=1, clip_on=False)
    parts = [points[i : i + window] for i in range(len(points) - window + 1)]
    centres = [part[window // 2].step for part in parts]
    means = [_mean_point(part) for part in parts]
    if series.errors:
        low = [m.value - m.error for m in means]
        _band(plot, centres, low, [m.value + m.error for m in means], colour)
    plot.plot(centres, [m.value for m in means], color=colour, linewidth=2.2, clip_on=False)


def _band(
    plot: Axes, steps: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str
) -> None:
    """Fill between two curves, without edges beyond the axes."""
    bottom, top = plot.get_ylim()
    edge = [(x, max(y, bottom)) for x, y in zip(steps, low, strict=True)]
    edge += [(x, min(y, top)) for x, y in reversed(list(zip(steps, high, strict=True)))]
    plot.fill(*zip(*edge, strict=True), color=colour, alpha=0.16, linewidth=0, clip_on=False)


def _dot(plot: Axes, x: float, y: float, colour: str, size: float, alpha: float = 1) -> None:
    """Draw a line without length, whose round ends are a dot."""
    plot.plot([x, x], [y, y], color=colour, linewidth=size, alpha=alpha, clip_on=False)


def _draw_marks(plot: Axes, marks: Sequence[ChartMark]) -> None:
    """Draw named lines from the left to the right end of the axes."""
    (left, right), (bottom, top) = plot.get_xlim(), plot.get_ylim()
    height = (top / 2 - bottom / 2) * 2
    for mark in marks:
        ends, levels = [left, right], [mark.value] * 2
        (line,) = plot.plot(ends, levels, color=LIGHT["soft"], linewidth=1, clip_on=False)
        line.set(dashes=(5, 3), dash_capstyle="butt")
        below = mark.value + 0.09 * height > top
        y = mark.value + (-0.02 if below else 0.02) * height
        name = plot.text(right, y, f"{mark.label} {label(mark.value)}", size=10, ha="right")
        name.set_verticalalignment("top" if below else "bottom")
