"""Drawings over frames: marks lie on the edges of pixels, inside the frame, and can be hidden."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rcot_rl.monitoring.pages.svg_overlay import MARK_KINDS, MARKS_STYLE, Overlay, marks_legend


def corners(svg: str, kind: str) -> np.ndarray:
    """Return the points [N, 2] of the outlines of a kind."""
    (outline,) = set(re.findall(rf'<path d="([^"]*)" class="mark {kind}"', svg))
    return np.array(re.findall(r"[-\d.]+", outline), dtype=float).reshape(-1, 2)


def attributes(svg: str, tag: str) -> list[dict[str, float]]:
    numbers = [
        re.findall(r' ([a-z]+\d?)="([-\d.]+)"', shape) for shape in re.findall(f"<{tag} .*?/>", svg)
    ]
    return [{name: float(value) for name, value in shape} for shape in numbers]


def test_outlines_run_along_pixel_edges() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:9, 10:21] = True
    overlay = Overlay(30, 20)
    overlay.outline(mask, "#ffffff", "truth", dashed=True)
    overlay.outline(~mask, "#ff3d8b", "predicted")
    svg = overlay.svg("f1")
    outline = corners(svg, "truth")
    assert outline.min(axis=0).tolist() == [10, 4] and outline.max(axis=0).tolist() == [21, 9]
    around = corners(svg, "predicted")
    assert around.min(axis=0).tolist() == [0, 0] and around.max(axis=0).tolist() == [30, 20]
    assert svg.count('class="mark truth"') == 2, "dashes on a dark line"
    assert svg.count("M") == 2 + 2, "the hole of the second mask has its own outline"


def test_outlines_are_simplified_but_close() -> None:
    ys, xs = np.mgrid[:480, :854]
    disc = (ys - 240) ** 2 + (xs - 400) ** 2 < 150**2
    overlay = Overlay(854, 480)
    overlay.outline(disc, "#ffffff", "truth")
    outline = corners(overlay.svg("f1"), "truth")
    radius = np.hypot(outline[:, 0] - 400.5, outline[:, 1] - 240.5)
    assert len(outline) < 200 and np.abs(radius - 150).max() < 1.5


def test_boxes_and_points_stay_in_the_frame() -> None:
    overlay = Overlay(30, 20)
    overlay.boxes([[2, 3, 8, 9], [-5, -5, 99, 99], [9, 9, 3, 3]], "#27e0ff", "box")
    overlay.points([[40, 5], [1e308, -7]], "#ffe14a", "point")
    svg = overlay.svg("f1")
    boxes = [[box[k] for k in ("x", "y", "width", "height")] for box in attributes(svg, "rect")]
    assert boxes == [[2, 3, 6, 6], [0, 0, 30, 20]], "a box without area is left out"
    assert [(dot["cx"], dot["cy"]) for dot in attributes(svg, "circle")] == [(30, 5), (30, 0)]


def test_an_empty_mask_has_no_outline() -> None:
    overlay = Overlay(30, 20)
    overlay.outline(np.zeros((20, 30), dtype=bool), "#ffffff", "truth", dashed=True)
    assert "<path" not in overlay.svg("f1")


def test_a_drawing_has_a_name_or_is_a_decoration() -> None:
    overlay = Overlay(30, 20)
    assert 'role="img" aria-label="&lt;alt&gt;"' in overlay.svg("f1", "<alt>")
    assert 'aria-hidden="true"' in overlay.svg("f1")
    assert 'alt="&lt;alt&gt;"' in overlay.html("data:", "<alt>")


@pytest.mark.parametrize("kind", MARK_KINDS)
def test_each_kind_of_mark_has_a_box_in_the_legend_that_hides_it(kind: str) -> None:
    assert f'class="show-{kind}" checked' in marks_legend(MARK_KINDS)
    assert f"section:has(.show-{kind}:not(:checked)) .mark.{kind}" in MARKS_STYLE
