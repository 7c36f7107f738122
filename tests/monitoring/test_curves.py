"""Charts and overlays: points inside the grid, round ticks, gaps, extremes, pixel edges."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.monitoring.curves import (
    HEIGHT,
    WIDTH,
    Series,
    how_drawn,
    label,
    line_chart,
    running_mean,
    window_of,
)
from rcot_rl.monitoring.shots import draw, spread

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
    assert (grid >= 0).all() and (grid <= (WIDTH, HEIGHT)).all()
    assert (drawn >= grid.min(axis=0) - 0.5).all() and (drawn <= grid.max(axis=0) + 0.5).all()
    assert 2 <= len(paths(svg, "var(--line)")) <= 9


def test_ticks_are_round() -> None:
    svg = line_chart("t", [Series("a", [1, 60], [0.0, 1.0])])
    assert tick_labels(svg, "middle") == ["0", "20", "40", "60", "step"]
    assert tick_labels(svg, "end") == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    constant = tick_labels(line_chart("t", [Series("a", [1, 60], [3.0, 3.0])]), "end")
    assert constant == ["2.6", "2.8", "3.0", "3.2", "3.4"]


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
    modules = "report, compare, reward_replay, run_summary, console"
    code = (
        f"import sys; from rcot_rl.monitoring import {modules}; print('matplotlib' in sys.modules)"
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
        "svg",
        "path",
        "text",
    }
    assert not re.findall(r"(?: id=|href|url\(|https?:| width=|#[0-9a-f]{6})", svg)
    assert 'aria-label="t by step; at the last step: a 2e-7"' in svg


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
def test_running_mean_is_a_mean(values: list[float]) -> None:
    window = window_of(len(values))
    assert window % 2 == 1
    means = running_mean(values, window)
    assert means[0] == values[0] and means[-1] == values[-1]
    assert min(values) - 1e-6 <= min(means) and max(means) <= max(values) + 1e-6
    line = [3.0 * i for i in range(len(values))]
    assert running_mean(line, 5) == pytest.approx(line)  # centred: a straight line stays


def test_numbers_have_short_labels() -> None:
    cases = {0: "0", 0.25: "0.25", 1234: "1234", 1e-5: "1e-5", 2.5e6: "2.5e6", 60.0: "60"}
    assert {value: label(value) for value in cases} == cases
    assert label(-0.5) == "-0.5"


def test_shown_predictions_range_from_best_to_worst() -> None:
    rows = [{"video": f"v{k}", "expression_id": "0", "J&F": float(k)} for k in range(100)]
    shown = [row["J&F"] for row in spread(rows, 5)]
    assert shown[0] == 99 and shown[-1] == 0 and shown == sorted(shown, reverse=True)
    assert len(spread(rows[:3], 5)) == 3


def test_outlines_run_along_pixel_edges() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:9, 10:21] = True
    html = draw(np.zeros((20, 30, 3), np.uint8), mask, ~mask, [[2, 3, 8, 9]], [[40, 5]], "<alt>")
    scale = 360 / 30
    (outline,) = paths(html, "#ffffff")
    assert outline.min(axis=0) / scale == pytest.approx((10, 4), abs=0.01)
    assert outline.max(axis=0) / scale == pytest.approx((21, 9), abs=0.01)
    (box,) = paths(html, "#27e0ff")
    assert box.min(axis=0) / scale == pytest.approx((2, 3), abs=0.01)
    assert box.max(axis=0) / scale == pytest.approx((8, 9), abs=0.01)
    (predicted,) = paths(html, "#ff3d8b")
    assert predicted.max(axis=0) / scale == pytest.approx((30, 20), abs=0.01), "the border"
    (dot,) = paths(html, "#000000; stroke-linejoin")
    assert dot.mean(axis=0) / scale == pytest.approx((30, 5), abs=0.5), "moved to the edge"
    assert 'alt="&lt;alt&gt;"' in html


def test_an_empty_mask_has_no_outline() -> None:
    empty = np.zeros((20, 30), dtype=bool)
    assert "<path" not in draw(np.zeros((20, 30, 3), np.uint8), empty, empty, [], [], "")


@pytest.mark.parametrize(
    ("n", "note"),
    [
        (40, "Thin: each step; thick: running mean of 5 steps."),
        (400, "Thin: each step; thick: running mean of 15 steps."),
        (500, "Thin: means of 2 steps; thick: running mean of 30 steps."),
        (1000, "Thin: means of 3 steps; thick: running mean of 45 steps."),
    ],
)
def test_the_note_counts_windows_in_steps(n: int, note: str) -> None:
    assert how_drawn(n) == note


def test_the_latest_value_is_of_the_last_step() -> None:
    steps = list(range(500))
    chart = line_chart("Reward", [Series("mean", steps, [0.0] * 499 + [10.0])])
    assert "mean <b>10</b>" in chart
