"""Measure `rcot segment` with the shipped models: `python -m rcot_rl.tiny.trained_eval`.

Clips are those of `rcot_rl.inference.demo_clip`, read back from mp4 as a user's video would be,
with one query each. J is the mean over a clip's frames of the IoU of two unions, that of the
targets and that of the objects found (1 in a frame without either). A query succeeds if J is at
least 0.5.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rcot_rl.evaluation.jf import region_similarity
from rcot_rl.inference.demo_clip import truth, unseen_clip, write_clip_video
from rcot_rl.inference.segment import SegmentModels
from rcot_rl.inference.segment_outcome import refused_frames
from rcot_rl.inference.video import read_clip
from rcot_rl.segmentation.segmenter import union

SUCCESS = 0.5
"""Least J of a query that succeeds."""


def query_rows(models: SegmentModels, indices: Sequence[int]) -> list[dict[str, object]]:
    """Return one row per clip: query, kind, number of targets, J, and what the policy selected."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for index in indices:
            scene, query = unseen_clip(index)
            file = Path(folder) / f"{index}.mp4"
            write_clip_video(file, scene)
            frames = read_clip(file)
            trace = models.traces(frames, [query.text], key=str(file))[0]
            predicted = np.zeros(frames.images.shape[:3], dtype=bool)
            for t, masks in models.masks(frames, trace):
                predicted[t] = union(masks)
            targets = truth(scene, query)
            rows.append(
                {
                    "clip": index,
                    "query": query.text,
                    "kind": query.kind,
                    "targets": len(query.targets),
                    "J": float(np.mean(region_similarity(targets, predicted))),
                    "keyframe": trace.keyframe,
                    "keyframe_shows_target": bool(targets[trace.keyframe].any()),
                    "first_frame_shows_target": bool(targets[0].any()),
                    "refused": refused_frames(trace),
                    "objects": len(trace.boxes_source),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one JSON line per clip, then the figures of the model card as a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-trained")
    parser.add_argument("--clips", type=int, default=100)
    options = parser.parse_args(arguments)
    with SegmentModels(options.model) as models:
        rows = query_rows(models, range(options.clips))
    for row in rows:
        print(json.dumps(row))
    print("\n| queries | number | J at least 0.5 | mean J | keyframe shows a target |")
    print("| --- | --- | --- | --- | --- |")
    for name, chosen in (
        ("all", rows),
        ("one target", [row for row in rows if row["targets"] == 1]),
        ("several targets", [row for row in rows if row["targets"] != 1]),
    ):
        values = np.array([row["J"] for row in chosen])
        shows = np.mean([row["keyframe_shows_target"] for row in chosen])
        print(
            f"| {name} | {len(chosen)} | {np.mean(values >= SUCCESS):.2f} | {values.mean():.3f} | "
            f"{shows:.2f} |"
        )
    shows = np.mean([row["first_frame_shows_target"] for row in rows])
    print(f"\nThe first frame shows a target in {shows:.2f} of the clips.")


if __name__ == "__main__":
    main()
