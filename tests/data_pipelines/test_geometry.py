"""Geometry equals brute force and the definitions."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest

from data_pipelines import geometry


def brute_point(mask: np.ndarray) -> tuple[int, int]:
    """Return the point by its definition: distances to all background pixels, also just outside."""
    h, w = mask.shape
    outside = [(y, x) for y in range(-1, h + 1) for x in range(-1, w + 1)]
    background = [(y, x) for y, x in outside if not (0 <= y < h and 0 <= x < w and mask[y, x])]
    best, at = -1, (0, 0)
    for y in range(h):
        for x in range(w):
            if mask[y, x]:
                near = min((y - a) ** 2 + (x - b) ** 2 for a, b in background)
                if near > best:
                    best, at = near, (x, y)
    return at


def random_masks(n: int, side: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    masks = []
    while len(masks) < n:
        h, w = rng.integers(1, side, 2)
        mask = rng.random((h, w)) < rng.choice([0.1, 0.6, 0.95, 1.0])
        if mask.any():
            masks.append(mask)
    return masks


def test_inscribed_pixel_equals_brute_force():
    for mask in random_masks(80, 14):
        assert geometry.inscribed_pixel(mask) == brute_point(mask)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (np.ones((1, 1), bool), (0, 0)),
        (np.ones((2, 2), bool), (0, 0)),
        (np.ones((5, 5), bool), (2, 2)),
        # The outside counts as background, so the border pulls the point inwards.
        (np.ones((3, 9), bool), (1, 1)),
    ],
)
def test_inscribed_pixel_of_plain_shapes(mask, expected):
    assert geometry.inscribed_pixel(mask) == expected


def test_point_and_box_follow_the_contract():
    rng = np.random.default_rng(1)
    for mask in random_masks(100, 40):
        h, w = mask.shape
        canvas = int(rng.choice([28, 112, 448, 840]))
        ys, xs = np.nonzero(mask)
        x, y = geometry.inscribed_pixel(mask)

        def up(v: Fraction, size: int, canvas: int = canvas) -> int:
            return floor(v * canvas / size + Fraction(1, 2))

        box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        grounded = geometry.ground(mask, canvas)
        sizes = (w, h, w, h)
        expected = [up(Fraction(int(v)), s) for v, s in zip(box, sizes, strict=True)]
        assert list(grounded.bbox_2d) == expected
        half = Fraction(1, 2)
        assert grounded.point_2d == (up(x + half, w), up(y + half, h))
        assert all(type(v) is int for v in (*grounded.bbox_2d, *grounded.point_2d))


def test_canvas_coordinates_round_half_up():
    # 1 px of a 16 px wide image is 52.5 px of the canvas.
    assert geometry.scale_half_up(1, 16, 840) == 53
    assert geometry.scale_half_up(Fraction(1, 2), 840, 840) == 1


def test_point_moves_with_the_mask():
    for mask in random_masks(30, 12):
        h, w = mask.shape
        framed = np.zeros((h + 9, w + 7), bool)
        framed[4 : 4 + h, 5 : 5 + w] = mask
        x, y = geometry.inscribed_pixel(mask)
        assert geometry.inscribed_pixel(framed) == (x + 5, y + 4)


def test_keyframe_is_the_earliest_of_the_largest():
    assert geometry.keyframe(np.array([0, 3, 7, 7, 1])) == 2
    assert geometry.keyframe(np.zeros(4, dtype=np.int64)) is None
    assert geometry.keyframe(np.zeros(0, dtype=np.int64)) is None
    assert geometry.empty_frames(np.array([0, 3, 0])).tolist() == [0, 2]


def test_an_empty_mask_has_no_box():
    with pytest.raises(ValueError):
        geometry.tight_box(np.zeros((3, 3), bool))


@pytest.mark.parametrize("size", [(20, 30), (200, 300), (50, 300), (56, 56)])
def test_to_canvas_keeps_flat_colour_and_place(size):
    frame = np.zeros((*size, 3), np.uint8)
    frame[:, size[1] // 2 :] = (10, 120, 250)
    out = geometry.to_canvas(frame, 56)
    assert out.shape == (56, 56, 3)
    assert out[28, 2].tolist() == [0, 0, 0]
    assert out[28, 53].tolist() == [10, 120, 250]
    if size == (56, 56):
        np.testing.assert_array_equal(out, frame)


def smoothed_lines(size: int, canvas: int) -> np.ndarray:
    """Return float64 [canvas, size]: linear interpolation between centres.

    Pixels are smoothed first if more than 1.6 map to one of the canvas.
    """
    lines, smooth = np.zeros((canvas, size)), np.eye(size)
    for i in range(canvas):
        at = min(max((i + 0.5) * size / canvas - 0.5, 0.0), size - 1.0)
        j = min(int(at), size - 2)
        lines[i, j] += 1 - (at - j)
        lines[i, j + 1] += at - j
    sigma = (size / canvas - 1) / 2
    if sigma > 0.3:
        smooth[:], reach = 0, int(np.ceil(3 * sigma))
        for j in range(size):
            for k in range(-reach, reach + 1):
                weight = np.exp(-((k / sigma) ** 2) / 2)
                smooth[j, min(max(j + k, 0), size - 1)] += weight
        smooth /= smooth.sum(axis=1, keepdims=True)
    return lines @ smooth


@pytest.mark.parametrize("size", [(480, 854), (540, 960), (400, 1100), (720, 500)])
@pytest.mark.parametrize("canvas", [840, 448])
def test_large_frames_are_smoothed_and_interpolated(size, canvas):
    height, width = size
    frame = np.random.default_rng(width).integers(0, 256, (*size, 3), dtype=np.uint8)
    across = np.einsum("xw,hwc->hxc", smoothed_lines(width, canvas), frame)
    expected = np.tensordot(smoothed_lines(height, canvas), across, axes=1)
    # integer kernels round by a level or two
    assert np.abs(geometry.to_canvas(frame, canvas) - expected).max() < 3


@pytest.mark.parametrize("shape", [(1398, 1398), (1398, 40), (700, 1398)])
def test_large_distances_are_exact_integers(shape, monkeypatch):
    """The largest masks that use single precision, compared with integer arithmetic."""
    rng = np.random.default_rng(shape[1])
    whole = np.pad(np.ones(shape, bool), 1)
    dusty = whole & (rng.random(whole.shape) > 1e-5)
    for mask in (whole, dusty):
        quick = geometry.inscribed_pixel(mask)
        with monkeypatch.context() as patch:
            patch.setattr(geometry, "_EXACT_SIDE", 0)
            assert geometry.inscribed_pixel(mask) == quick
