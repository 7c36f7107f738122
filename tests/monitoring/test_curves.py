"""Charts: every point inside the axes, round ticks around the data, gaps and extremes."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcot_rl.monitoring.curves import (
    HEIGHT,
    WIDTH,
    Series,
    how_drawn,
    label,
    labels,
    line_chart,
    running_mean,
    ticks,
    window_of,
)
from rcot_rl.monitoring.shots import draw, spread

numbers = st.floats(-1e12, 1e12, allow_nan=False)


@given(st.lists(numbers, min_size=1, max_size=30))
def test_ticks_enclose_the_data(values: list[float]) -> None:
    found = ticks(values)
    slack = 1e-6 * max(map(abs, found))
    assert found == sorted(found) and 2 <= len(found) <= 9
    assert found[0] <= min(values) + slack and max(values) <= found[-1] + slack


def test_ticks_are_round() -> None:
    assert ticks([0, 1]) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ticks([1, 60]) == [0, 20, 40, 60]
    assert any(math.isclose(tick, 3) for tick in ticks([3.0]))


def points(svg: str) -> np.ndarray:
    paths = re.findall(r'<path class="[^"]*" d="M([^"]*)"', svg)
    return np.array([[float(v) for v in p.split()] for path in paths for p in path.split("L")])


@given(st.lists(numbers, min_size=2, max_size=60))
def test_curves_stay_inside(values: list[float]) -> None:
    svg = line_chart("t", [Series("a", range(len(values)), values)])
    found = points(svg)
    assert (found >= 0).all() and (found[:, 0] <= WIDTH).all() and (found[:, 1] <= HEIGHT).all()


def test_a_rising_curve_rises() -> None:
    found = points(line_chart("t", [Series("a", [1, 2, 3], [1.0, 2.0, 3.0])]))
    assert (np.diff(found[:, 0]) > 0).all() and (np.diff(found[:, 1]) < 0).all()


def test_gaps_single_points_and_nothing() -> None:
    svg = line_chart(
        "t", [Series("a", [1, 2, 3], [1.0, math.nan, 3.0]), Series("b", [2], [math.inf])]
    )
    assert len(points(svg)) == 2 and "–" in svg
    assert "<circle" in line_chart("t", [Series("a", [5], [2.0])])
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


def test_ticks_of_small_steps_are_told_apart() -> None:
    assert labels([0, 0.0005, 0.001, 0.0015]) == ["0", "0.0005", "0.001", "0.0015"]
    found = labels(ticks([100_000.0, 100_000.4]))
    assert len(set(found)) == len(found)


def test_labels() -> None:
    cases = {0: "0", 0.25: "0.25", 1234: "1234", 1e-5: "1e-5", 2.5e6: "2.5e6", 60.0: "60"}
    assert {value: label(value) for value in cases} == cases
    assert label(-0.5) == "-0.5"


def test_shown_predictions_reach_from_best_to_worst() -> None:
    rows = [{"video": f"v{k}", "expression_id": "0", "J&F": float(k)} for k in range(100)]
    shown = [row["J&F"] for row in spread(rows, 5)]
    assert shown[0] == 99 and shown[-1] == 0 and shown == sorted(shown, reverse=True)
    assert len(spread(rows[:3], 5)) == 3


def test_outlines_run_along_pixel_edges() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:9, 10:21] = True
    svg = draw(np.zeros((20, 30, 3), np.uint8), mask, np.zeros_like(mask), [[2, 3, 8, 9]], [])
    d = re.search(r'class="truth" d="M([^"]*)Z"', svg).group(1)
    xy = np.array([[float(v) for v in p.split()] for p in d.split("L")])
    assert np.abs(xy.min(axis=0) - (10, 4)).max() <= 0.25
    assert np.abs(xy.max(axis=0) - (21, 9)).max() <= 0.25
    assert '<rect class="box" x="2.00" y="3.00" width="6.00" height="6.00"/>' in svg
    assert '<path class="pred" d=""/>' in svg


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (40, "Thin: each step; thick: running mean of 5 steps."),
        (400, "Thin: each step; thick: running mean of 15 steps."),
        (500, "Thin: means of 2 steps; thick: running mean of 30 steps."),
        (1000, "Thin: means of 3 steps; thick: running mean of 45 steps."),
    ],
)
def test_how_a_curve_is_drawn_is_said_in_steps(n, said):
    assert how_drawn(n) == said


def test_the_latest_value_is_the_last_steps_own():
    steps = list(range(500))
    chart = line_chart("Reward", [Series("mean", steps, [0.0] * 499 + [10.0])])
    assert "mean <b>10</b>" in chart
