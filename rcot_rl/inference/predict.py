"""Predictions of a corpus' expressions, as masks and traces on disk.

The folder's layout is in `rcot_rl.prediction_layout`. An expression's folder is written in one
step, so an interrupted run resumes where it stopped. An expression's mask is the union of its
objects' masks (paper, eq. 7).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_pipelines.corpora.corpus import Corpus, CorpusFault, Expression, Video
from rcot_rl.errors import InputError
from rcot_rl.inference.pipeline import Pipeline
from rcot_rl.inference.policy import Policy
from rcot_rl.inference.query_trace import Trace, VideoClip, VideoQuery, as_dict
from rcot_rl.prediction_layout import (
    SETTINGS_FILE,
    TRACE_FILE,
    expression_folder,
    mask_file,
)
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.recipe.inference_section import PredictSection
from rcot_rl.recipe.schema import CanvasSection
from rcot_rl.segmentation.segmenter import VideoSegmenter, union
from rcot_rl.system.files import read_json_object, write_text

PARTIAL = ".partial-"

_Job = tuple[Video, Expression, Path]
"""What to predict, and the folder to write."""


@dataclass
class PredictCounts:
    """Number of expressions of one call of `predict`."""

    predicted: int = 0
    skipped: int = 0
    """Already predicted before."""
    faults: int = 0
    """Predicted, with a fault in the trace."""


def predict(
    corpus: Corpus,
    policy: Policy,
    prompts: Prompts,
    section: PredictSection,
    canvas: CanvasSection,
    segmenter: VideoSegmenter,
    out_dir: Path,
    *,
    model: str,
    seed: int = 0,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PredictCounts:
    """Predict every expression of a corpus that `out_dir` does not have yet.

    Args:
        model: Identifies the weights. Predictions of another model, prompt set, segmenter or
            setting are never mixed with those in `out_dir`.
        progress: Called with (done, total) after each expression.

    Raises:
        InputError: `out_dir` has predictions of other settings, the corpus has no expression, an id
            cannot name a folder, or a frame cannot be read.
    """
    pairs = [(v, e) for v in corpus.videos() for e in v.expressions][:limit]
    if not pairs:
        raise InputError("the corpus has no expressions", file=corpus.expressions_file)
    # Expressions with the same id share a folder, which has the prediction of the last one.
    # A video without frames has nothing to predict; the evaluation reports it.
    folders = {
        expression_folder(out_dir, video.id, expression.id): (video, expression)
        for video, expression in pairs
        if video.frames
    }
    _claim(out_dir, _settings(prompts, section, canvas, segmenter, model, seed))
    _remove_partial(out_dir)
    todo = [
        (video, expression, folder)
        for folder, (video, expression) in folders.items()
        if not _is_complete(folder, video)
    ]
    counts = PredictCounts(skipped=len(folders) - len(todo))
    pipeline = Pipeline(policy, prompts, section, canvas, seed)
    loaded: str | None = None
    for start in range(0, len(todo), section.batch):
        batch = todo[start : start + section.batch]
        for (video, expression, folder), trace in _traces(corpus, pipeline, batch):
            if loaded != video.id:
                loaded, frames_thwc = video.id, _frames(corpus, video)
            write_expression(folder, video, expression, trace, segmenter, frames_thwc)
            counts.predicted += 1
            counts.faults += bool(trace.faults)
            if progress is not None:
                progress(counts.predicted + counts.skipped, len(folders))
    return counts


def _is_complete(folder: Path, video: Video) -> bool:
    """Return True if the folder has the trace and all masks; a copy may be interrupted."""
    files = (folder / TRACE_FILE, *(mask_file(folder, frame) for frame in video.frames))
    return all(file.is_file() for file in files)


def masks_of(trace: Trace, frames_thwc: np.ndarray, segmenter: VideoSegmenter) -> np.ndarray:
    """Return the union of a trace's objects over the clip (eqs. 6 and 7).

    Args:
        frames_thwc: uint8 `[T, H, W, 3]` RGB, the whole clip.

    Returns:
        bool `[T, H, W]`.
    """
    if not trace.boxes_source:
        return np.zeros(frames_thwc.shape[:3], dtype=bool)
    boxes, points = np.array(trace.boxes_source), np.array(trace.points_source)
    masks_nthw = segmenter.segment(frames_thwc, trace.keyframe, boxes, points)
    expected = (len(boxes), *frames_thwc.shape[:3])
    if masks_nthw.shape != expected:
        raise ValueError(
            f"{segmenter.name} returned masks of shape {masks_nthw.shape}, expected {expected}"
        )
    return union(masks_nthw)


def write_masks(folder: Path, names: tuple[str, ...], masks_thw: np.ndarray) -> None:
    """Write bool `[T, H, W]` masks as `<name>.png`, single channel, 0 or 255."""
    for name, mask in zip(names, masks_thw, strict=True):
        encoded, png = cv2.imencode(".png", mask.astype(np.uint8) * 255)
        if not encoded:
            raise RuntimeError(f"{name}: OpenCV could not encode the mask")
        mask_file(folder, name).write_bytes(png.tobytes())


def write_expression(
    folder: Path,
    video: Video,
    expression: Expression,
    trace: Trace,
    segmenter: VideoSegmenter,
    frames_thwc: np.ndarray,
) -> None:
    """Segment one expression, and write its masks and trace to `folder` in one step."""
    masks = masks_of(trace, frames_thwc, segmenter)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f"{PARTIAL}{folder.name}"
    partial.mkdir()
    try:
        write_masks(partial, video.frames, masks)
        more = {
            "video": video.id,
            "expression_id": expression.id,
            "keyframe_name": video.frames[trace.keyframe],
            "n_frames": len(video.frames),
            "source_size": list(frames_thwc.shape[1:3]),
            "segmenter": segmenter.name,
        }
        text = json.dumps(as_dict(trace, **more), ensure_ascii=False, indent=1)
        (partial / TRACE_FILE).write_text(text + "\n", encoding="utf-8")
        if folder.exists():  # incomplete: partly removed or copied, or not a prediction
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _traces(
    corpus: Corpus, pipeline: Pipeline, batch: Sequence[_Job]
) -> Iterator[tuple[_Job, Trace]]:
    clips = {video.id: _clip(corpus, video) for video, _, _ in batch}
    queries = [VideoQuery(clips[video.id], expression.text) for video, expression, _ in batch]
    return zip(batch, pipeline.run(queries), strict=True)


def _clip(corpus: Corpus, video: Video) -> VideoClip:
    def read(index: int) -> np.ndarray:
        return _frame(corpus, video, index)

    return VideoClip(video.id, len(video.frames), read)


def _frame(corpus: Corpus, video: Video, index: int) -> np.ndarray:
    try:
        return corpus.frame(video.id, video.frames[index])
    except CorpusFault as fault:
        message = f"{fault.reason} ({fault.detail})" if fault.detail else fault.reason
        raise InputError(message, file=fault.place, key=video.id) from fault


def _frames(corpus: Corpus, video: Video) -> np.ndarray:
    frames = [_frame(corpus, video, index) for index in range(len(video.frames))]
    for name, frame in zip(video.frames, frames, strict=True):
        if frame.shape != frames[0].shape:
            file = corpus.frame_path(video.id, name)
            raise InputError("size differs from the video's first frame", file=file)
    return np.stack(frames)


def _settings(
    prompts: Prompts,
    section: PredictSection,
    canvas: CanvasSection,
    segmenter: VideoSegmenter,
    model: str,
    seed: int,
) -> dict[str, Any]:
    templates = json.dumps(dict(prompts.templates), sort_keys=True)
    return {
        "model": model,
        "prompts": prompts.name,
        "prompts_sha256": hashlib.sha256(templates.encode()).hexdigest(),
        "predict": section.model_dump(mode="json", exclude={"batch"}),
        "canvas": canvas.model_dump(mode="json"),
        "segmenter": segmenter.name,
        "seed": seed,
    }


def _claim(out_dir: Path, settings: dict[str, Any]) -> None:
    """Write the settings of these predictions, or check that they equal those of the folder."""
    out_dir.mkdir(parents=True, exist_ok=True)
    file = out_dir / SETTINGS_FILE
    if not file.is_file():
        write_text(file, json.dumps(settings, indent=1) + "\n")
        return
    recorded = read_json_object(file)
    for key, value in settings.items():
        if recorded.get(key) != value:
            raise InputError(
                "these predictions were made with other settings; choose another folder or "
                "remove this one",
                file=file,
                key=key,
            )


def _remove_partial(out_dir: Path) -> None:
    for partial in out_dir.rglob(f"{PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
