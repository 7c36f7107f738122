"""Judges segmenters on held-out lattice clips: `python -m rcot_rl.tiny.sam2_eval [SPEC ...]`.

Every object is prompted with its true box and its most interior point, on the middle one of the
frames in which it is visible; so the figures say what masks cost, not what grounding costs. J is
the Jaccard index, 1 where both masks are empty. The baseline is the box itself, in every frame.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from data_pipelines.toy.scenes import PRESETS, make_scene
from rcot_rl.inference.segmenter import Segmenter, load_segmenter

EVAL_STREAM = 90211
CLIPS = 24


@dataclass(frozen=True)
class Case:
    """One object of one clip. frames: uint8 [T, H, W, 3]; masks: bool [T, H, W], the truth."""

    frames: np.ndarray
    masks: np.ndarray
    key: int
    box: np.ndarray
    point: np.ndarray


class StaticBox:
    """The prompt itself as the mask of every frame: what any tracker must beat."""

    name = "static box"

    def segment(
        self, frames_thwc: np.ndarray, key: int, boxes_source: np.ndarray, points_source: np.ndarray
    ) -> np.ndarray:
        masks = np.zeros((len(boxes_source), *frames_thwc.shape[:3]), dtype=bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes_source.astype(int), strict=True):
            mask[:, y1:y2, x1:x2] = True
        return masks


def cases(clips: int = CLIPS, preset: str = "lattice") -> Iterator[Case]:
    """Every object that is ever visible in `clips` held-out clips."""
    for k in range(clips):
        scene = make_scene(np.random.default_rng([EVAL_STREAM, k]), PRESETS[preset])
        frames = np.stack([scene.render(t) for t in range(scene.n_frames)])
        tracks = np.stack([scene.masks(t) for t in range(scene.n_frames)], axis=1)
        for masks in tracks:
            visible = np.flatnonzero(masks.any(axis=(1, 2)))
            if len(visible):
                key = int(visible[len(visible) // 2])
                yield Case(frames, masks, key, *true_prompt(masks[key]))


def true_prompt(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tight box [4] (exclusive right and bottom) and the most interior pixel [2] of `mask`."""
    ys, xs = np.nonzero(mask)
    box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], float)
    inner = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(inner.argmax(), inner.shape)
    return box, np.array([x, y], float)


def jaccard(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """J per frame, [T], of bool [T, H, W] masks."""
    both = (found & truth).sum(axis=(1, 2))
    either = (found | truth).sum(axis=(1, 2))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def evaluate(segmenter: Segmenter, clips: int = CLIPS, preset: str = "lattice") -> dict[str, float]:
    """Means over objects: J at the key frame, over all frames, over those that show the object."""
    at_key, over_video, where_visible, absent = [], [], [], []
    for case in cases(clips, preset):
        found = segmenter.segment(case.frames, case.key, case.box[None], case.point[None])[0]
        scores = jaccard(found, case.masks)
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", nargs="*", default=["tiny", "flow"], help="tiny, flow or a folder")
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="lattice")
    args = parser.parse_args()
    for segmenter in (StaticBox(), *(load_segmenter(spec) for spec in args.spec)):
        result = evaluate(segmenter, args.clips, args.preset)
        print(json.dumps({"segmenter": segmenter.name, "preset": args.preset, **result}))


if __name__ == "__main__":
    main()
