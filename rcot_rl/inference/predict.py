"""A corpus' expressions to masks on disk: `RUN/predictions/<benchmark>/…` of a run's folder.

    OUT/settings.json                                what the predictions were made with
    OUT/<video>/<expression_id>/<frame>.png          single channel, 0 or 255, source size
    OUT/<video>/<expression_id>/trace.json           all that the model said, and where it looked

An expression's folder appears whole or not at all, so a run that was killed goes on where it was.
Equation 7 of the paper: an expression's mask is the union of its objects'.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np

from data_pipelines.corpora.base import Corpus, CorpusFault, Expression, Video
from rcot_rl.errors import InputError
from rcot_rl.inference.pipeline import Pipeline
from rcot_rl.inference.policy import Policy
from rcot_rl.inference.segmenter import Segmenter, union
from rcot_rl.inference.trace import Clip, Query, Trace, as_dict
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.recipe.inference import PredictSection
from rcot_rl.recipe.schema import CanvasSection

TRACE = "trace.json"
SETTINGS = "settings.json"
PARTIAL = ".partial-"


@dataclass
class Summary:
    """What one call of `predict` did."""

    predicted: int = 0
    skipped: int = 0
    """Expressions that were already there."""

    faults: int = 0
    """Predicted expressions whose trace has a fault."""


def predict(
    corpus: Corpus,
    policy: Policy,
    prompts: Prompts,
    section: PredictSection,
    canvas: CanvasSection,
    segmenter: Segmenter,
    out_dir: Path,
    *,
    model: str,
    seed: int = 0,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Predict every expression of the corpus (the first `limit`) that `out_dir` does not have yet.

    model: identifies the weights; predictions of another model, prompt set, segmenter or
    setting are never mixed with those in `out_dir`. progress(done, total) is called after each
    expression. Raises InputError for predictions of other settings, ids that are no paths, and
    frames that cannot be read.
    """
    pairs = [(v, e) for v in corpus.videos() for e in v.expressions][:limit]
    if not pairs:
        raise InputError("the corpus has no expressions", file=corpus.expressions_file)
    # Expressions that share an id share a folder, which holds the prediction of the last one.
    # A video without frames has nothing to predict; the evaluation lists it.
    places = {
        expression_dir(out_dir, video.id, expression.id): (video, expression)
        for video, expression in pairs
        if video.frames
    }
    _claim(out_dir, _settings(prompts, section, canvas, segmenter, model, seed))
    _remove_partial(out_dir)
    todo = [
        (video, expression, place)
        for place, (video, expression) in places.items()
        if not _is_whole(place, video)
    ]
    summary = Summary(skipped=len(places) - len(todo))
    pipeline = Pipeline(policy, prompts, section, canvas, seed)
    shown: str | None = None
    for start in range(0, len(todo), section.batch):
        batch = todo[start : start + section.batch]
        for video, expression, place, trace in _reasoned(corpus, pipeline, batch):
            if shown != video.id:
                shown, frames_thwc = video.id, _frames(corpus, video)
            write_expression(place, video, expression, trace, segmenter, frames_thwc)
            summary.predicted += 1
            summary.faults += bool(trace.faults)
            if progress is not None:
                progress(summary.predicted + summary.skipped, len(places))
    return summary


def expression_dir(out_dir: Path, video_id: str, expression_id: str) -> Path:
    """OUT/<video>/<expression_id>; video ids may hold slashes. InputError for `..` and the like."""
    for name, what in ((video_id, "video"), (expression_id, "expression")):
        parts = PurePosixPath(name).parts
        odd = not parts or name.startswith("/") or "\0" in name or "\\" in name
        if odd or any(part.startswith(".") for part in parts):
            raise InputError(f"the id of this {what} cannot name a folder", key=name)
    return out_dir / video_id / expression_id


def _is_whole(place: Path, video: Video) -> bool:
    """Return True if an expression's trace and all of its masks are there, as after a copy."""
    names = (TRACE, *(f"{frame}.png" for frame in video.frames))
    return all((place / name).is_file() for name in names)


def masks_of(trace: Trace, frames_thwc: np.ndarray, segmenter: Segmenter) -> np.ndarray:
    """bool [T, H, W]: the union of the trace's objects over the clip (eqs. 6 and 7)."""
    if not trace.boxes_source:
        return np.zeros(frames_thwc.shape[:3], dtype=bool)
    boxes, points = np.array(trace.boxes_source), np.array(trace.points_source)
    masks_nthw = segmenter.segment(frames_thwc, trace.keyframe, boxes, points)
    wanted = (len(boxes), *frames_thwc.shape[:3])
    if masks_nthw.shape != wanted:
        raise ValueError(f"{segmenter.name} made masks {masks_nthw.shape}, not {wanted}")
    return union(masks_nthw)


def write_masks(folder: Path, names: tuple[str, ...], masks_thw: np.ndarray) -> None:
    """`<name>.png` for each frame: single channel, 0 or 255."""
    for name, mask in zip(names, masks_thw, strict=True):
        done, png = cv2.imencode(".png", mask.astype(np.uint8) * 255)
        if not done:
            raise RuntimeError(f"{name}: the mask could not be encoded")
        (folder / f"{name}.png").write_bytes(png.tobytes())


def write_expression(
    place: Path,
    video: Video,
    expression: Expression,
    trace: Trace,
    segmenter: Segmenter,
    frames_thwc: np.ndarray,
) -> None:
    """Segment, and put masks and trace at `place` in one step."""
    masks = masks_of(trace, frames_thwc, segmenter)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.parent / f"{PARTIAL}{place.name}"
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
        (partial / TRACE).write_text(text + "\n", encoding="utf-8")
        if place.exists():  # without a trace or a mask: not ours, or half removed or copied
            shutil.rmtree(place)
        os.replace(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _reasoned(
    corpus: Corpus, pipeline: Pipeline, batch: list[tuple[Video, Expression, Path]]
) -> Iterator[tuple[Video, Expression, Path, Trace]]:
    clips = {video.id: _clip(corpus, video) for video, _, _ in batch}
    queries = [Query(clips[video.id], expression.text) for video, expression, _ in batch]
    for item, trace in zip(batch, pipeline.run(queries), strict=True):
        yield *item, trace


def _clip(corpus: Corpus, video: Video) -> Clip:
    def read(index: int) -> np.ndarray:
        return _frame(corpus, video, index)

    return Clip(video.id, len(video.frames), read)


def _frame(corpus: Corpus, video: Video, index: int) -> np.ndarray:
    try:
        return corpus.frame(video.id, video.frames[index])
    except CorpusFault as fault:
        says = f"{fault.reason} ({fault.detail})" if fault.detail else fault.reason
        raise InputError(says, file=fault.place, key=video.id) from fault


def _frames(corpus: Corpus, video: Video) -> np.ndarray:
    frames = [_frame(corpus, video, index) for index in range(len(video.frames))]
    for name, frame in zip(video.frames, frames, strict=True):
        if frame.shape != frames[0].shape:
            file = corpus.frame_path(video.id, name)
            raise InputError("not of the size of the video's first frame", file=file)
    return np.stack(frames)


def _settings(
    prompts: Prompts,
    section: PredictSection,
    canvas: CanvasSection,
    segmenter: Segmenter,
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
    """Write the settings of these predictions, or check that they are those that lie there."""
    out_dir.mkdir(parents=True, exist_ok=True)
    file = out_dir / SETTINGS
    if not file.is_file():
        partial = out_dir / f"{PARTIAL}{SETTINGS}"
        partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, file)
        return
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"not readable as JSON: {error}", file=file) from error
    for key, value in settings.items():
        if not isinstance(there, dict) or there.get(key) != value:
            raise InputError(
                "these predictions were made with other settings; choose another folder or "
                "remove this one",
                file=file,
                key=key,
            )


def _remove_partial(out_dir: Path) -> None:
    for left in out_dir.rglob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)
        left.unlink(missing_ok=True)
