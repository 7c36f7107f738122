"""J and F against an independent implementation of the definition, and against golden values.

The golden values were computed once with the DAVIS 2017 evaluation code itself.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from rcot_rl.evaluation.jf import BOUND_TH, jf_video, match_radius, region_similarity


def plain_boundary(mask: np.ndarray) -> np.ndarray:
    """Return the pixels that differ from a neighbour; beyond the image the edge is repeated."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    neighbours = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return np.any([mask != neighbour for neighbour in neighbours], axis=0)


def plain_share(edge: np.ndarray, other: np.ndarray, radius: float) -> float:
    """Return the share of edge pixels whose nearest pixel of `other` is within `radius`."""
    squared = np.rint(distance_transform_edt(~other) ** 2)
    return int((squared[edge] <= radius**2).sum()) / int(edge.sum())


def boundary_f(gt: np.ndarray, pred: np.ndarray, bound_th: float = BOUND_TH) -> float:
    return jf_video(gt[None], pred[None], bound_th)[1][0]


def plain_jf(gt: np.ndarray, pred: np.ndarray, bound_th: float) -> tuple[float, float]:
    """Return J and F by the definition, with distance transforms instead of dilations."""
    union = int((gt | pred).sum())
    jaccard = int((gt & pred).sum()) / union if union else 1.0
    radius = bound_th if bound_th >= 1 else math.ceil(bound_th * math.hypot(*gt.shape))
    gt_edge, pred_edge = plain_boundary(gt), plain_boundary(pred)
    if not gt_edge.any() and not pred_edge.any():
        return jaccard, 1.0
    if not gt_edge.any() or not pred_edge.any():
        return jaccard, 0.0
    precision = plain_share(pred_edge, gt_edge, radius)
    recall = plain_share(gt_edge, pred_edge, radius)
    if precision + recall == 0:
        return jaccard, 0.0
    return jaccard, 2 * precision * recall / (precision + recall)


def random_mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return an empty or full mask, a pixel, noise, boxes, an ellipse, or a mask at an edge."""
    mask = np.zeros((height, width), dtype=bool)
    kind = rng.integers(0, 8)
    if kind == 1:
        mask[:] = True
    elif kind == 2:
        mask[rng.integers(height), rng.integers(width)] = True
    elif kind == 3:
        mask = rng.random((height, width)) < rng.random()
    elif kind in (4, 5):
        for _ in range(rng.integers(1, 4)):
            y, x = np.sort(rng.integers(0, height + 1, 2)), np.sort(rng.integers(0, width + 1, 2))
            mask[y[0] : y[1], x[0] : x[1]] = True
    elif kind == 6:
        ys, xs = np.mgrid[:height, :width]
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        ry, rx = rng.uniform(1, height), rng.uniform(1, width)
        mask = ((ys - cy) / ry) ** 2 + ((xs - cx) / rx) ** 2 < 1
    elif kind == 7:
        mask[rng.integers(height) :, rng.integers(width) :] = True
    return mask


@pytest.mark.parametrize("seed", range(8))
def test_10000_random_pairs_score_as_by_the_definition_to_the_last_bit(seed: int) -> None:
    rng = np.random.default_rng([7, seed])
    for _ in range(250):
        height, width = (int(rng.integers(1, side)) for side in (40, 140))
        bound_th = float(rng.choice([0, 0.008, 0.02, 0.1, 0.3, 1, 3, 20, 70]))
        gt, pred = (np.stack([random_mask(rng, height, width) for _ in range(5)]) for _ in "ab")
        if rng.random() < 0.4:  # alike, as good predictions are
            pred = np.roll(gt, tuple(rng.integers(-2, 3, 2)), axis=(1, 2))
        jaccard, boundary = jf_video(gt, pred, bound_th)
        for t in range(5):
            expected = plain_jf(gt[t], pred[t], bound_th)
            assert (jaccard[t], boundary[t]) == expected, (height, width, bound_th)
            assert region_similarity(gt[t], pred[t]) == jaccard[t]


def disk(radius: int, y: int, x: int) -> np.ndarray:
    ys, xs = np.mgrid[:480, :854]
    return (ys - y) ** 2 + (xs - x) ** 2 <= radius**2


def test_scores_equal_golden_values_of_the_reference() -> None:
    gt, pred, empty = disk(100, 240, 427), disk(95, 250, 437), np.zeros((480, 854), dtype=bool)
    assert region_similarity(gt, pred) == 0.8213458490796051
    assert boundary_f(gt, pred) == 0.4767229388823738
    assert (region_similarity(empty, empty), boundary_f(empty, empty)) == (1, 1)
    assert (region_similarity(gt, empty), boundary_f(gt, empty)) == (0, 0)
    assert (region_similarity(empty, pred), boundary_f(empty, pred)) == (0, 0)
    full = ~empty
    assert (region_similarity(full, empty), boundary_f(full, empty)) == (0, 1)


def test_match_radius_is_0_008_of_the_diagonal_rounded_up() -> None:
    sizes = {(480, 854): 8, (720, 1280): 12, (1080, 1920): 18, (300, 400): 4}
    assert {size: match_radius(size) for size in sizes} == sizes
    assert match_radius((480, 854), 3) == 3
    for bad in (-0.1, 2.5, math.nan, math.inf):
        with pytest.raises((ValueError, OverflowError)):
            match_radius((480, 854), bad)


def test_nonzero_pixels_are_foreground_and_videos_are_scored_per_frame() -> None:
    rng = np.random.default_rng(3)
    gt = np.stack([random_mask(rng, 40, 70) for _ in range(6)])
    pred = np.stack([random_mask(rng, 40, 70) for _ in range(6)])
    jaccard, boundary = jf_video(gt.astype(np.uint8) * 255, pred.astype(np.int16) * -3)
    assert np.array_equal(jaccard, region_similarity(gt, pred))
    bytes_255 = (gt.astype(np.uint8) * 255).view(bool), (pred.astype(np.uint8) * 255).view(bool)
    assert np.array_equal(jf_video(*bytes_255), (jaccard, boundary))
    alone = [jf_video(g[None], p[None]) for g, p in zip(gt, pred, strict=True)]
    assert np.array_equal(jaccard, [j[0] for j, _ in alone])
    assert np.array_equal(boundary, [f[0] for _, f in alone])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 80), st.integers(1, 140))
def test_scores_are_bounded_symmetric_and_one_for_equal_masks(
    seed: int, height: int, width: int
) -> None:
    rng = np.random.default_rng(seed)
    gt, pred = random_mask(rng, height, width), random_mask(rng, height, width)
    jaccard, boundary = region_similarity(gt, pred), boundary_f(gt, pred)
    assert 0 <= jaccard <= 1 and 0 <= boundary <= 1
    assert jaccard == region_similarity(pred, gt)
    assert boundary == pytest.approx(boundary_f(pred, gt), abs=1e-12)
    assert region_similarity(gt, gt) == boundary_f(gt, gt) == 1


def test_larger_radius_never_lowers_f() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        gt, pred = random_mask(rng, 50, 90), random_mask(rng, 50, 90)
        scores = [boundary_f(gt, pred, th) for th in (1, 2, 4, 8, 16, 32)]
        assert scores == sorted(scores)


@pytest.mark.parametrize("shapes", [((3, 4), (4, 3)), ((2, 3, 4), (3, 4)), ((0, 4), (0, 4))])
def test_different_shapes_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    gt, pred = (np.zeros(shape, dtype=bool) for shape in shapes)
    with pytest.raises(ValueError, match="shape"):
        region_similarity(gt, pred)
    with pytest.raises(ValueError, match=r"shape|T, H, W"):
        jf_video(gt, pred)


def test_video_without_frames_has_no_scores() -> None:
    nothing = np.zeros((0, 5, 6), dtype=bool)
    assert [len(scores) for scores in jf_video(nothing, nothing)] == [0, 0]
