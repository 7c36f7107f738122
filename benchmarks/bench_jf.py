"""Compare J and F with a plain implementation, in speed and for equality, on one thread.

    python benchmarks/bench_jf.py [--frames 60] [--repeat 3]

The plain implementation is that of public evaluation scripts: boolean arrays, boundary maps from
shifted copies, dilation with a disk in OpenCV. Both score the same frames in the same run; the
smallest time of `repeat` counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import cv2
import numpy as np

from rcot_rl.evaluation.jf import jf_video

SIZES = ((480, 854), (720, 1280))
SHARES = (0.01, 0.06, 0.25)


def plain_jf(gt: np.ndarray, pred: np.ndarray) -> tuple[float, float]:
    """Return J and F of two masks, bool [H, W]."""
    union = np.count_nonzero(gt | pred)
    jaccard = np.count_nonzero(gt & pred) / union if union else 1.0
    radius = int(np.ceil(0.008 * np.linalg.norm(gt.shape)))
    ys, xs = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = (ys**2 + xs**2 <= radius**2).astype(np.uint8)
    edges = [_plain_boundary(mask) for mask in (gt, pred)]
    near = [cv2.dilate(edge.astype(np.uint8), disk) for edge in edges]
    n_gt, n_pred = (int(np.sum(edge)) for edge in edges)
    if n_gt == 0 or n_pred == 0:
        return jaccard, float(n_gt == n_pred)
    precision = float(np.sum(edges[1] * near[0])) / n_pred
    recall = float(np.sum(edges[0] * near[1])) / n_gt
    if precision + recall == 0:
        return jaccard, 0.0
    return jaccard, 2 * precision * recall / (precision + recall)


def _plain_boundary(mask: np.ndarray) -> np.ndarray:
    right, below, diagonal = (np.zeros_like(mask) for _ in range(3))
    right[:, :-1] = mask[:, 1:]
    below[:-1] = mask[1:]
    diagonal[:-1, :-1] = mask[1:, 1:]
    edge = (mask ^ right) | (mask ^ below) | (mask ^ diagonal)
    edge[-1] = mask[-1] ^ right[-1]
    edge[:, -1] = mask[:, -1] ^ below[:, -1]
    edge[-1, -1] = False
    return edge


def moving_blob(size: tuple[int, int], share: float, frames: int, seed: int) -> np.ndarray:
    """Return bool [T, H, W]: an irregular ellipse of about `share` of the image that moves."""
    rng = np.random.default_rng([seed, *size])
    height, width = size
    ys, xs = np.mgrid[:height, :width]
    radius = np.sqrt(share * height * width / np.pi)
    phase = rng.uniform(0, 6, 4)
    masks = np.empty((frames, height, width), dtype=bool)
    for t in range(frames):
        cy = height * (0.5 + 0.2 * np.sin(t / 9 + phase[0]))
        cx = width * (0.5 + 0.25 * np.sin(t / 7 + phase[1]))
        angle = np.arctan2(ys - cy, xs - cx)
        edge = radius * (1 + 0.15 * np.sin(5 * angle + phase[2]) + 0.03 * np.sin(40 * angle))
        masks[t] = np.hypot(ys - cy, (xs - cx) * 0.9) < edge
    return masks


def best_of(repeat: int, work: Callable[[], object]) -> float:
    """Return the CPU seconds of the fastest run, which other processes disturb least."""
    times = []
    for _ in range(repeat):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def main() -> None:
    """Print one line per size and share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    print(f"{'size':>9} {'object':>6} {'plain ms':>9} {'ours ms':>8} {'masks/s':>8} {'ratio':>6}")
    for size in SIZES:
        for share in SHARES:
            gt = moving_blob(size, share, options.frames, seed=1)
            pred = np.roll(gt, (3, -5), axis=(1, 2))
            expected = np.array([plain_jf(g, p) for g, p in zip(gt, pred, strict=True)])
            if not np.array_equal(np.stack(jf_video(gt, pred), axis=1), expected):
                raise SystemExit(f"{size} {share}: the results differ")

            def plain(gt: np.ndarray = gt, pred: np.ndarray = pred) -> None:
                for g, p in zip(gt, pred, strict=True):
                    plain_jf(g, p)

            def packed(gt: np.ndarray = gt, pred: np.ndarray = pred) -> None:
                jf_video(gt, pred)

            slow, fast = (best_of(options.repeat, f) / options.frames for f in (plain, packed))
            print(
                f"{size[0]:>4}x{size[1]:<4} {share:>6.0%} {slow * 1e3:>9.2f} {fast * 1e3:>8.3f} "
                f"{1 / fast:>8.0f} {slow / fast:>6.1f}"
            )


if __name__ == "__main__":
    main()
