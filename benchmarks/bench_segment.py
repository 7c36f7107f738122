"""Measure SAM2 on clips that are read from disk: speed of several queries, and memory.

    python benchmarks/bench_segment.py [--frames 40] [--queries 3] [--lengths 100 500] [--sam2 tiny]
                                       [--device cpu]

1. Queries about one video, streamed with shared image features, against the plain way: the whole
   clip and all its masks in memory, and image features for each query. Both include decoding, and
   must give the same masks.
2. Growth of the peak resident memory while one query is segmented, for clips of several lengths,
   each in a new process. Image features have 16 MiB here, so that every clip fills them.

Clips are generated: 720 x 1280, one moving disc, JPEG.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from rcot_rl.recipe.inference_section import SegmenterSection
from rcot_rl.segmentation.clip_frames import ClipFrames
from rcot_rl.segmentation.sam2 import FeatureStore, Sam2Segmenter
from rcot_rl.segmentation.segmenter import collect, load_segmenter, union

HEIGHT, WIDTH = 720, 1280
RADIUS = 90
FEATURE_BYTES = 16 << 20


def center(t: int, length: int) -> tuple[int, int]:
    """Return the disc's centre x, y in frame `t`."""
    return 150 + (WIDTH - 300) * t // length, 360


def write_clip(folder: Path, length: int) -> None:
    """Write the clip's frames as JPEG."""
    noise = np.random.default_rng(0).integers(60, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    ground = cv2.GaussianBlur(noise, (0, 0), 3)
    for t in range(length):
        frame = ground.copy()
        cv2.circle(frame, center(t, length), RADIUS, (40, 60, 220), -1)
        cv2.imwrite(str(folder / f"{t:05d}.jpg"), frame)


def read(path: Path) -> np.ndarray:
    """Return a frame, uint8 [H, W, 3] RGB."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return image


def streamed(folder: Path, length: int) -> ClipFrames:
    """Return the clip, read on request."""
    files = [folder / f"{t:05d}.jpg" for t in range(length)]
    return ClipFrames(length, lambda t: read(files[t]), files.__getitem__)


def prompt(t: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return box [1, 4] and point [1, 2] of the disc in frame `t`."""
    x, y = center(t, length)
    return np.array([[x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS]], float), np.array([[x, y]])


def plain_queries(segmenter: Sam2Segmenter, folder: Path, length: int, keys: list[int]) -> Any:
    """Return masks [T, H, W] per query, with everything in memory and nothing shared."""
    frames = np.stack([read(folder / f"{t:05d}.jpg") for t in range(length)])
    segmenter.features = FeatureStore(0)
    return [collect(segmenter.segment(frames, key, *prompt(key, length)))[0] for key in keys]


def streamed_queries(segmenter: Sam2Segmenter, folder: Path, length: int, keys: list[int]) -> Any:
    """Return an iterator of (t, mask [H, W]) per query."""
    frames = streamed(folder, length)
    segmenter.features = FeatureStore(segmenter.settings.feature_bytes)
    for key in keys:
        for t, masks in segmenter.segment(frames, key, *prompt(key, length)):
            yield key, t, union(masks)


def speed(folder: Path, options: argparse.Namespace) -> None:
    """Print frames per second of both ways."""
    segmenter = load(options, SegmenterSection())
    length = options.frames
    keys = np.linspace(0, length - 1, options.queries).astype(int).tolist()
    # CPU seconds on a CPU, since other processes disturb them least
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    for _ in segmenter.segment(streamed(folder, 2), 0, *prompt(0, length)):
        pass  # warm up
    started = clock()
    expected = plain_queries(segmenter, folder, length, keys)
    plain = clock() - started
    wrong, together = 0, 0.0
    started = clock()
    for key, t, mask in streamed_queries(segmenter, folder, length, keys):
        together += clock() - started
        wrong += not np.array_equal(mask, expected[keys.index(key)][t])
        started = clock()
    if wrong:
        raise SystemExit(f"{wrong} masks differ")
    work = length * len(keys)
    print(f"{len(keys)} queries on {length} frames of {HEIGHT} x {WIDTH}, {segmenter.name}")
    print(f"in memory, features per query:  {work / plain:7.1f} frames/s")
    print(f"streamed, features shared:      {work / together:7.1f} frames/s", end="")
    print(f"   ratio {plain / together:.2f}")


def memory(folder: Path, length: int, plain: bool, options: argparse.Namespace) -> dict[str, float]:
    """Return the growth of the peak resident memory in MiB, and frames per second."""
    segmenter = load(options, SegmenterSection(feature_bytes=FEATURE_BYTES))
    for _ in segmenter.segment(streamed(folder, 12), 6, *prompt(6, length)):
        pass  # loads libraries
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present value
    before, started = peak_mib(), time.perf_counter()
    if plain:
        masks = plain_queries(segmenter, folder, length, [length // 2])[0]
        shown = sum(mask.any() for mask in masks)
    else:
        stream = streamed_queries(segmenter, folder, length, [length // 2])
        shown = sum(mask.any() for _, _, mask in stream)
    if shown < 0.9 * length:
        raise SystemExit(f"the object was lost: {shown} masks of {length}")
    growth = peak_mib() - before
    return {"growth_mib": growth, "frames_per_s": length / (time.perf_counter() - started)}


def peak_mib() -> float:
    """Return the maximum resident memory of this process since it was reset; Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def load(options: argparse.Namespace, settings: SegmenterSection) -> Sam2Segmenter:
    """Load the segmenter; exit if it is not SAM2."""
    segmenter = load_segmenter(options.sam2, options.device, settings)
    if not isinstance(segmenter, Sam2Segmenter):
        raise SystemExit("--sam2: has no image features to share")
    return segmenter


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--queries", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 500])
    parser.add_argument("--sam2", default="tiny")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # folder, length, plain or not
    options = parser.parse_args()
    if options.one:
        folder, length, way = options.one
        print(json.dumps(memory(Path(folder), int(length), way == "plain", options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_clip(folder, options.frames)
        speed(folder, options)
        for length in options.lengths:
            write_clip(folder, length)
            ways = ("streamed", "plain") if length == options.lengths[0] else ("streamed",)
            for way in ways:
                command = [sys.executable, __file__, "--one", temporary, str(length), way]
                command += ["--sam2", options.sam2, "--device", options.device]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                result = json.loads(output.stdout)
                print(
                    f"{length} frames, {way}: peak memory grows by {result['growth_mib']:.0f} MiB, "
                    f"{result['frames_per_s']:.1f} frames/s"
                )


if __name__ == "__main__":
    main()
