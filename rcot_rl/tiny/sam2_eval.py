"""Evaluate segmenters on held-out clips: `python -m rcot_rl.tiny.sam2_eval [SPEC ...]`.

Every object is prompted with its true box and its most interior pixel, in the middle one of the
frames in which it is visible, so the figures measure masks without the errors of grounding. J is
the region similarity, 1 if both masks are empty. The baseline is the box itself, in every frame.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipelines.geometry import tight_box
from data_pipelines.toy.scenes import PRESETS, make_scene
from rcot_rl.evaluation.jf import region_similarity
from rcot_rl.segmentation.clip_frames import FrameSequence
from rcot_rl.segmentation.segmenter import (
    FrameMasks,
    VideoSegmenter,
    collect,
    load_segmenter,
    visiting_order,
)
from rcot_rl.tiny.sam2_data import interior_pixel

EVAL_STREAM = 90211
CLIPS = 24


@dataclass(frozen=True)
class TrackingCase:
    """One object of one clip, with its prompt."""

    frames: np.ndarray
    """uint8 [T, H, W, 3] RGB"""
    masks: np.ndarray
    """bool [T, H, W], the ground truth"""
    key: int
    """Index of the prompted frame."""
    box: np.ndarray
    """float [4]: x1, y1, x2, y2, half-open, in pixels"""
    point: np.ndarray
    """float [2]: x, y in pixels"""


class StaticBox:
    """The prompted box as the mask of every frame: a lower bound for every tracker."""

    name = "static box"

    def segment(
        self,
        frames: FrameSequence,
        key: int,
        boxes_source: np.ndarray,
        points_source: np.ndarray | None,
    ) -> Iterator[FrameMasks]:
        """Yield the filled boxes."""
        masks = np.zeros((len(boxes_source), *frames[key].shape[:2]), dtype=bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes_source.astype(int), strict=True):
            mask[y1:y2, x1:x2] = True
        for t in visiting_order(len(frames), key):
            yield t, masks


def cases(clips: int = CLIPS, preset: str = "lattice") -> Iterator[TrackingCase]:
    """Yield every object that is ever visible in `clips` held-out clips."""
    for k in range(clips):
        scene = make_scene(np.random.default_rng([EVAL_STREAM, k]), PRESETS[preset])
        frames = np.stack([scene.render(t) for t in range(scene.n_frames)])
        tracks = np.stack([scene.masks(t) for t in range(scene.n_frames)], axis=1)
        for masks in tracks:
            visible = np.flatnonzero(masks.any(axis=(1, 2)))
            if len(visible):
                key = int(visible[len(visible) // 2])
                yield TrackingCase(frames, masks, key, *true_prompt(masks[key]))


def true_prompt(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tight box, float [4], and the most interior pixel, float [2], of `mask`."""
    return np.array(tight_box(mask), float), np.array(interior_pixel(mask), float)


def evaluate(
    segmenter: VideoSegmenter, clips: int = CLIPS, preset: str = "lattice"
) -> dict[str, float]:
    """Return means over objects.

    The figures are J at the prompted frame, over all frames and over the frames that show the
    object, and the share of frames without the object in which the mask is empty.
    """
    at_key: list[float] = []
    over_video: list[float] = []
    where_visible: list[float] = []
    absent: list[float] = []
    for case in cases(clips, preset):
        segmented = segmenter.segment(case.frames, case.key, case.box[None], case.point[None])
        masks = collect(segmented)[0]
        scores = np.asarray(region_similarity(case.masks, masks))
        visible = case.masks.any(axis=(1, 2))
        at_key.append(scores[case.key])
        over_video.append(scores.mean())
        where_visible.append(scores[visible].mean())
        absent.extend(scores[~visible])
    return {
        "objects": len(at_key),
        "j_key": round(float(np.mean(at_key)), 4),
        "j_video": round(float(np.mean(over_video)), 4),
        "j_where_visible": round(float(np.mean(where_visible)), 4),
        "empty_where_absent": round(float(np.mean(absent)), 4) if absent else 1.0,
    }


def main() -> None:
    """Print one JSON line per segmenter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", nargs="*", default=["tiny", "flow"], help="tiny, flow or a folder")
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="lattice")
    args = parser.parse_args()
    segmenters: list[VideoSegmenter] = [StaticBox(), *map(load_segmenter, args.spec)]
    for segmenter in segmenters:
        result = evaluate(segmenter, args.clips, args.preset)
        print(json.dumps({"segmenter": segmenter.name, "preset": args.preset, **result}))


if __name__ == "__main__":
    main()
