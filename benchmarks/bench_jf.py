"""Compare J and F with the DAVIS 2017 reference, in speed and for equality, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/bench_jf.py [--frames 20] [--repeat 7]

The reference is davis2017-evaluation's `metrics.py` (BSD 3-Clause, © 2020 DAVIS), restated with the
same array operations in the same order, and with scikit-image's `disk`. Both score the same clips
in turns. Times are milliseconds per frame: minimum and median CPU time, and minimum wall time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable

import cv2
import numpy as np

from rcot_rl.evaluation.jf import jf_video

SIZES = ((480, 854), (720, 1280))
SHAPES = ("disk", "ragged", "several")
SHARES = (0.01, 0.06, 0.25, 0.5, 0.9)


def reference_jf(gt_thw: np.ndarray, pred_thw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return J and F of each frame, both float64 [T], as the reference computes them."""
    boundary = np.zeros(len(gt_thw))
    for t in range(len(gt_thw)):
        boundary[t] = _reference_f(gt_thw[t], pred_thw[t])
    return _reference_j(gt_thw, pred_thw), boundary


def _reference_j(gt: np.ndarray, pred: np.ndarray) -> np.ndarray:
    gt, pred = gt.astype(bool), pred.astype(bool)
    void = np.zeros_like(pred)
    shared = np.sum((pred & gt) & np.logical_not(void), axis=(-2, -1))
    union = np.sum((pred | gt) & np.logical_not(void), axis=(-2, -1))
    with np.errstate(invalid="ignore"):
        jaccard = shared / union
    jaccard[np.isclose(union, 0)] = 1
    return jaccard


def _reference_f(gt: np.ndarray, pred: np.ndarray) -> float:
    void = np.zeros_like(pred).astype(bool)
    radius = np.ceil(0.008 * np.linalg.norm(pred.shape))
    pred_edge = _reference_boundary(pred * np.logical_not(void))
    gt_edge = _reference_boundary(gt * np.logical_not(void))
    pred_near = cv2.dilate(pred_edge.astype(np.uint8), _disk(radius).astype(np.uint8))
    gt_near = cv2.dilate(gt_edge.astype(np.uint8), _disk(radius).astype(np.uint8))
    gt_match, pred_match = gt_edge * pred_near, pred_edge * gt_near
    n_pred, n_gt = np.sum(pred_edge), np.sum(gt_edge)
    if n_pred == 0 or n_gt == 0:
        return float(n_pred == n_gt)
    precision, recall = np.sum(pred_match) / float(n_pred), np.sum(gt_match) / float(n_gt)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def _reference_boundary(mask: np.ndarray) -> np.ndarray:
    mask = mask.astype(bool)
    mask[mask > 0] = 1
    right, below, diagonal = np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)
    right[:, :-1] = mask[:, 1:]
    below[:-1, :] = mask[1:, :]
    diagonal[:-1, :-1] = mask[1:, 1:]
    edge = mask ^ right | mask ^ below | mask ^ diagonal
    edge[-1, :] = mask[-1, :] ^ right[-1, :]
    edge[:, -1] = mask[:, -1] ^ below[:, -1]
    edge[-1, -1] = 0
    return edge


def _disk(radius: float) -> np.ndarray:
    offsets = np.arange(-radius, radius + 1)
    xs, ys = np.meshgrid(offsets, offsets)
    return np.array((xs**2 + ys**2) <= radius**2, dtype=np.uint8)


def moving_object(shape: str, size: tuple[int, int], share: float, frames: int) -> np.ndarray:
    """Return bool [T, H, W]: `share` of the image, moving by (1, 2) pixels per frame.

    Args:
        shape: A disk (cut off by the image's edges if large), a disk with a ragged outline, or
            several objects.
        size: (H, W).
        share: Area as a share of the image.
        frames: Length T.
    """
    rng = np.random.default_rng([SHAPES.index(shape), *size])
    height, width = size
    ys, xs = np.mgrid[:height, :width]
    level = np.hypot(ys - 0.45 * height, xs - 0.55 * width)
    if shape == "ragged":
        level += 200 * cv2.GaussianBlur(rng.standard_normal(size), (0, 0), 4)
    if shape == "several":
        level = cv2.GaussianBlur(rng.standard_normal(size), (0, 0), height / 16)
    mask = level < np.quantile(level, share)
    return np.stack([np.roll(mask, (t, 2 * t), axis=(0, 1)) for t in range(frames)])


def timed(repeat: int, works: list[Callable[[], object]]) -> np.ndarray:
    """Run the functions in turns.

    Returns:
        Seconds [function, 3]: minimum and median CPU time, and minimum wall time.
    """
    seconds = np.empty((len(works), repeat, 2))
    for i in range(repeat):
        for runs, work in zip(seconds, works, strict=True):
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            runs[i] = time.process_time() - cpu, time.perf_counter() - wall
    cpu, wall = seconds[..., 0], seconds[..., 1]
    return np.stack([cpu.min(axis=1), np.median(cpu, axis=1), wall.min(axis=1)], axis=1)


def main() -> None:
    """Print one line per size, shape and area."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    columns = f"{'CPU':>7}{'median':>7}{'wall':>7}"
    print(f"{'':21}{'reference, ms':>21}{'jf.py, ms':>21}{'ratio':>21}")
    print(f"{'size':>8} {'shape':>7} {'area':>4}{columns * 3}{'masks/s':>9}")
    for size, shape, share in itertools.product(SIZES, SHAPES, SHARES):
        gt = moving_object(shape, size, share, options.frames)
        pred = np.roll(gt, (3, -5), axis=(1, 2))
        name = f"{size[0]}x{size[1]:<4} {shape:>7} {share:>4.0%}"
        if not np.array_equal(jf_video(gt, pred), reference_jf(gt, pred)):
            raise SystemExit(f"{name}: the results differ")
        works = [functools.partial(score, gt, pred) for score in (reference_jf, jf_video)]
        slow, fast = timed(options.repeat, works) / options.frames
        cells = [f"{x * 1e3:7.2f}" for x in slow] + [f"{x * 1e3:7.3f}" for x in fast]
        cells += [f"{x:7.1f}" for x in slow / fast]
        print(f"{name}{''.join(cells)}{1 / fast[0]:9.0f}")


if __name__ == "__main__":
    main()
