"""Measure how much faster queries about one video are segmented if they share image features.

    python benchmarks/bench_segment.py [--frames 40] [--queries 3] [--sam2 tiny] [--device cpu]

The baseline is the same segmenter with space for one frame's features, so that each query encodes
every frame of the video. The benchmark checks that both return the same masks.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from rcot_rl.segmentation.sam2 import FeatureStore, Sam2Segmenter
from rcot_rl.segmentation.segmenter import load_segmenter


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--queries", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sam2", default="tiny")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (options.frames, 480, 854, 3), dtype=np.uint8)
    segmenter = load_segmenter(options.sam2, options.device)
    if not isinstance(segmenter, Sam2Segmenter):
        parser.error("--sam2: has no image features to share")
    keys = np.linspace(0, options.frames - 1, options.queries).astype(int)
    box, point = np.array([[200.0, 100.0, 500.0, 400.0]]), np.array([[350.0, 250.0]])

    # CPU seconds on a CPU, since other processes disturb them least
    clock = time.process_time if options.device == "cpu" else time.perf_counter

    def run(most_bytes: int) -> tuple[float, list[np.ndarray]]:
        best, masks = float("inf"), []
        for _ in range(options.repeat):
            segmenter.features = FeatureStore(most_bytes)
            started = clock()
            masks = [segmenter.segment(frames, int(key), box, point) for key in keys]
            best = min(best, clock() - started)
        return best, masks

    apart, expected = run(0)
    together, masks = run(2 << 30)
    if not all(np.array_equal(a, b) for a, b in zip(masks, expected, strict=True)):
        raise SystemExit("the masks differ")
    work = options.frames * options.queries
    print(f"features per query:  {work / apart:8.1f} frames/s")
    print(f"features shared:     {work / together:8.1f} frames/s   ratio {apart / together:.2f}")


if __name__ == "__main__":
    main()
