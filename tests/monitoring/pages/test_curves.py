"""Charts and overlays: points inside the grid, round ticks, gaps, extremes, pixel edges."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.monitoring.pages.curves import (
    HEIGHT,
    WIDTH,
    ChartMark,
    Series,
    dot_chart,
    how_drawn,
    label,
    line_chart,
    window_means,
    window_of,
)

numbers = st.floats(-1e12, 1e12, allow_nan=False)
few = settings(max_examples=25, deadline=None)


def paths(svg: str, stroke: str) -> list[np.ndarray]:
    """Return the points [N, 2] of each path whose stroke starts with `stroke`."""
    outlines = re.findall(rf'<path d="([^"]*)" style="[^"]*stroke: {re.escape(stroke)}', svg)
    return [np.array(re.findall(r"[\d.]+", o), dtype=float).reshape(-1, 2) for o in outlines]


def points(svg: str) -> np.ndarray:
    return np.concatenate(paths(svg, "var(--s"))


def tick_labels(svg: str, anchor: str) -> list[str]:
    """Return labels of the y axis (anchor `end`) or of the x axis (`middle`), with its title."""
    return re.findall(rf"text-anchor: {anchor}[^>]*>([^<]*)</text>", svg)


@few
@given(st.lists(numbers | st.floats(-1e300, 1e300), min_size=2, max_size=60))
def test_curves_stay_inside_the_grid(values: list[float]) -> None:
    svg = line_chart("t", [Series("a", range(len(values)), values)])
    grid, drawn = np.concatenate(paths(svg, "var(--line)")), points(svg)
    for lines in (grid, drawn):
        assert (lines >= 0).all() and (lines <= (WIDTH, HEIGHT)).all()
    assert 1 <= len(paths(svg, "var(--line)")) <= 9


@few
@given(st.lists(st.floats(-1e6, 1e6), min_size=9, max_size=60, unique=True))
def test_axes_end_where_the_curve_ends(values: list[float]) -> None:
    """From left to right nothing is empty, and at most a tenth is above and below."""
    thin, *_ = paths(line_chart("t", [Series("a", range(7, 7 + len(values)), values)]), "var(--s1)")
    grid = np.concatenate(
        paths(line_chart("t", [Series("a", range(7, 7 + len(values)), values)]), "var(--line)")
    )
    assert thin[:, 0].min() == pytest.approx(grid[:, 0].min(), abs=0.2)
    assert thin[:, 0].max() == pytest.approx(grid[:, 0].max(), abs=0.2)
    assert np.ptp(thin[:, 1]) > 0.6 * HEIGHT


def test_the_thick_line_is_the_mean_of_whole_windows_only() -> None:
    """A step at the end must not pull the line, as it would with a shrinking window."""
    values = [0.0] * 39 + [100.0]
    svg = line_chart("t", [Series("a", range(1, 41), values)])
    thin, thick = paths(svg, "var(--s1)")
    window = window_of(40)
    assert len(thin) == 40 and len(thick) == 40 - window + 1
    assert thick[0, 0] == pytest.approx(thin[window // 2, 0], abs=0.1)
    assert thick[-1, 0] == pytest.approx(thin[-1 - window // 2, 0], abs=0.1)
    height = thin[0, 1] - thin[-1, 1]
    assert thick[0, 1] - thick[-1, 1] == pytest.approx(height / window, abs=0.2)


def test_the_band_is_the_standard_error_of_the_thick_line() -> None:
    """Five independent steps with an error of 1 have a mean with an error of 1 / sqrt(5)."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    svg = line_chart("t", [Series("a", range(40), values, errors=[1.0] * 40)])
    (band,) = re.findall(r'<path d="([^"]*)" style="fill: var\(--s1\)[^"]*opacity', svg)
    edge = np.array(re.findall(r"[\d.]+", band), dtype=float).reshape(-1, 2)
    thin, _ = paths(svg, "var(--s1)")
    unit = np.ptp(thin[:, 1]) / np.ptp(values)
    at_first = edge[np.isclose(edge[:, 0], edge[0, 0], atol=0.2)]
    assert np.ptp(at_first[:, 1]) == pytest.approx(2 / math.sqrt(5) * unit, rel=0.03)


def test_marks_are_lines_unless_they_would_squeeze_the_curve() -> None:
    def chart(value: float) -> str:
        return line_chart(
            "t", [Series("a", [1, 2, 3], [2.0, 2.5, 2.6])], marks=[ChartMark(value, "maximum")]
        )

    assert len(paths(chart(3.0), "var(--soft)")) == 1 and ">maximum 3</text>" in chart(3.0)
    assert not paths(chart(300.0), "var(--soft)") and "<span>maximum 300 ↑</span>" in chart(300.0)
    assert "maximum: 300" in chart(300.0), "the alternative text names it too"
    assert np.ptp(points(chart(300.0))[:, 1]) > 0.6 * HEIGHT


def test_dots_of_later_steps_are_darker() -> None:
    svg = dot_chart("t", Series("a", [40.0, 50.0, 45.0], [1.0, 2.0, 3.0]), ("tokens", "reward"))
    dots = paths(svg, "var(--s1)")
    assert len(dots) == 3 and all((dot[0] == dot[1]).all() for dot in dots)
    opacities = [float(x) for x in re.findall(r"stroke-opacity: ([\d.]+)", svg)]
    assert opacities == sorted(opacities) and len(set(opacities)) >= 2
    with pytest.raises(ValueError, match="nothing"):
        dot_chart("t", Series("a", [math.nan], [1.0]), ("x", "y"))


def test_ticks_are_round() -> None:
    svg = line_chart("t", [Series("a", [1, 60], [0.0, 1.0])])
    assert tick_labels(svg, "middle") == ["10", "20", "30", "40", "50", "60", "step"]
    assert tick_labels(svg, "end") == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    constant = tick_labels(line_chart("t", [Series("a", [1, 60], [3.0, 3.0])]), "end")
    assert constant == ["2.7", "2.8", "2.9", "3.0", "3.1", "3.2", "3.3"]


def test_ticks_with_small_steps_have_different_labels() -> None:
    labels = tick_labels(line_chart("t", [Series("a", [1, 2], [100_000.0, 100_000.4])]), "end")
    assert len(set(labels)) == len(labels) and "100000.2" in labels


def test_a_rising_curve_rises() -> None:
    drawn = points(line_chart("t", [Series("a", [1, 2, 3], [1.0, 2.0, 3.0])]))
    assert (np.diff(drawn[:, 0]) > 0).all() and (np.diff(drawn[:, 1]) < 0).all()


def test_the_same_chart_is_the_same_text() -> None:
    charts = {line_chart("t", [Series("a", [1, 2], [1.0, 2.0])]) for _ in range(2)}
    assert len(charts) == 1


def test_matplotlib_is_imported_only_to_draw(run_python: Callable[..., str]) -> None:
    code = (
        "import sys; from rcot_rl.monitoring.pages import report, compare, reward_replay; "
        "from rcot_rl.monitoring.terminal import run_summary, console; "
        "print('matplotlib' in sys.modules)"
    )
    assert run_python(code).strip() == "False"


def test_charts_can_share_a_page() -> None:
    """They have no ids, style sheets, links, fixed sizes or colours of one theme."""
    svg = line_chart("t", [Series("a", [1, 2], [1e-7, 2e-7])])
    assert set(re.findall(r"<(\w+)", svg)) <= {
        "figure",
        "figcaption",
        "span",
        "b",
        "p",
        "svg",
        "path",
        "text",
    }
    assert not re.findall(r"(?: id=|href|url\(|https?:| width=|#[0-9a-f]{6})", svg)
    spoken = "t, steps 1 to 2. a: first 1e-7, last 2e-7, lowest 1e-7, highest 2e-7"
    assert f'aria-label="{spoken}"' in svg


def test_gaps_and_single_points_are_drawn_and_empty_charts_refused() -> None:
    svg = line_chart(
        "t", [Series("a", [1, 2, 3], [1.0, math.nan, 3.0]), Series("b", [2], [math.inf])]
    )
    assert len(points(svg)) == 2 and "–" in svg
    (dot,) = paths(line_chart("t", [Series("a", [5], [2.0])]), "var(--s1)")
    assert len(dot) == 2 and (dot[0] == dot[1]).all()
    with pytest.raises(ValueError, match="nothing"):
        line_chart("t", [Series("a", [1], [math.nan])])
    with pytest.raises(ValueError, match="6 at most"):
        line_chart("t", [Series("a", [1], [1.0])] * 7)


def test_long_curves_keep_their_mean() -> None:
    values = np.random.default_rng(1).normal(size=10_000)
    svg = line_chart("t", [Series("a", range(10_000), values)])
    assert len(points(svg)) <= 800 and len(svg) < 30_000


def test_names_are_escaped() -> None:
    svg = line_chart("<t>", [Series("<a>", [1], [1.0])])
    assert "<t>" not in svg and "<a>" not in svg


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_window_means_are_means_of_neighbours(values: list[float]) -> None:
    window = window_of(len(values))
    assert window % 2 == 1
    expected = np.convolve(values, np.ones(window) / window, mode="valid")
    assert window_means(values, window) == pytest.approx(list(expected), abs=1e-6)


def test_numbers_have_short_labels() -> None:
    cases = {0: "0", 0.25: "0.25", 1234: "1234", 1e-5: "1e-5", 2.5e6: "2.5e6", 60.0: "60"}
    assert {value: label(value) for value in cases} == cases
    assert label(-0.5) == "-0.5"


@pytest.mark.parametrize(
    ("n", "note"),
    [
        (5, "Lines: each step."),
        (40, "Thin line: each step. Thick line: mean of the 5 steps"),
        (400, "Thin line: each step. Thick line: mean of the 15 steps"),
        (500, "Thin line: means of 2 steps. Thick line: mean of the 30 steps"),
        (1000, "Thin line: means of 3 steps. Thick line: mean of the 45 steps"),
    ],
)
def test_the_note_counts_windows_in_steps(n: int, note: str) -> None:
    assert how_drawn(n, bands=False).startswith(note)
    assert "standard error" not in how_drawn(n, bands=False)
    assert n < 8 or "standard error" in how_drawn(n, bands=True)


def test_the_latest_value_is_of_the_last_step() -> None:
    steps = list(range(500))
    chart = line_chart("Reward", [Series("mean", steps, [0.0] * 499 + [10.0])])
    assert "mean <b>10</b>" in chart
