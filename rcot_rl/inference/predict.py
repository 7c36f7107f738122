"""Predictions of a corpus' expressions, as masks and traces on disk.

A set of predictions is made in three steps that may run in different processes: `open_set` lists
what is missing, `trace_video` reasons about the queries of one video, and `write_expression` makes
the masks. `prediction_pool` runs them.

The folder's layout is in `rcot_rl.prediction_layout`. An expression's folder is written in one
step, so an interrupted run resumes where it stopped. An expression's mask is the union of its
objects' masks (paper, eq. 7).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.corpora import open_corpus
from data_pipelines.corpora.corpus import Corpus, CorpusFault, Video
from rcot_rl.errors import InputError
from rcot_rl.inference.oracle import Oracle
from rcot_rl.inference.pipeline import VideoReasoner
from rcot_rl.inference.query_trace import Trace, VideoClip, as_dict
from rcot_rl.prediction_layout import (
    SETTINGS_FILE,
    TRACE_FILE,
    expression_folder,
    mask_file,
)
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.recipe.inference_section import ReasoningSection
from rcot_rl.recipe.schema import CanvasSection
from rcot_rl.segmentation.clip_frames import ClipFrames, FrameSequence
from rcot_rl.segmentation.mask_store import MaskStore, StoredMasks, encode_mask, masks_key
from rcot_rl.segmentation.segmenter import VideoSegmenter, union
from rcot_rl.system.files import read_json_object, write_text

PARTIAL = ".partial-"

_EXECUTION_ONLY = frozenset({"max_frames"})
"""Keys of `predict` that predictions of one folder may differ in: the traces list the frames."""


@dataclass(frozen=True)
class CorpusSplit:
    """The expressions to predict."""

    dataset: str
    root: str
    split: str
    limit: int | None = None

    def open(self) -> Corpus:
        """Return the corpus."""
        return open_corpus(self.dataset, Path(self.root), self.split)


@dataclass(frozen=True)
class Target:
    """One prediction to make."""

    expression: str
    """The expression's id."""
    variant: str | None
    folder: str


@dataclass
class PredictionSet:
    """What one folder has and lacks."""

    total: int
    """Number of expressions."""
    missing: dict[str, list[Target]]
    """By video, in the corpus' order."""


def open_set(
    corpus: Corpus,
    out_dir: Path,
    settings: Mapping[str, Any],
    *,
    variant: str | None = None,
    limit: int | None = None,
) -> PredictionSet:
    """Return the predictions that a folder lacks, and record or check its settings.

    Args:
        settings: Result of `settings_of`. Predictions of different settings are never mixed.

    Raises:
        InputError: `out_dir` has predictions of other settings, the corpus has no expression, or an
            id cannot name a folder.
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
    _claim(out_dir, settings)
    _remove_partial(out_dir)
    missing: dict[str, list[Target]] = {}
    for folder, (video, expression) in folders.items():
        if not _is_complete(folder, video):
            target = Target(expression.id, variant, str(folder))
            missing.setdefault(video.id, []).append(target)
    return PredictionSet(len(folders), missing)


def settings_of(
    *,
    model: str,
    others: Mapping[str, str],
    prompts: Prompts,
    reasoning: ReasoningSection,
    canvas: CanvasSection,
    segmenter: str,
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    """Return what predictions depend on.

    Args:
        model: Identifies the checkpoint's weights.
        others: The same for each model in `reasoning.models`.
        segmenter: Name of the segmenter.
        dtype: Value of `segmenter.dtype`.
    """
    templates = json.dumps(dict(prompts.templates), sort_keys=True)
    section = reasoning.model_dump(mode="json", exclude={*_EXECUTION_ONLY, "models"})
    return {
        "model": model,
        "models": {task: others[name] for task, name in sorted(reasoning.models.items())},
        "prompts": prompts.name,
        "prompts_sha256": hashlib.sha256(templates.encode()).hexdigest(),
        "predict": section,
        "canvas": canvas.model_dump(mode="json"),
        "segmenter": segmenter,
        "segmenter_dtype": dtype,
        "seed": seed,
    }


@dataclass(frozen=True)
class Traced:
    """The trace of one target, or why there is none."""

    target: Target
    trace: Trace | None
    fault: str = ""


async def trace_video(
    corpus: Corpus,
    video: Video,
    targets: Sequence[Target],
    reasoner: VideoReasoner,
    settings: Mapping[str | None, ReasoningSection],
) -> list[Traced]:
    """Reason about all targets of a video at the same time.

    A target whose frames cannot be read, or whose prompt does not fit, has a fault instead of a
    trace; the others go on.

    Args:
        settings: By variant.
    """
    expressions = {expression.id: expression for expression in video.expressions}

    async def one(target: Target) -> Traced:
        expression = expressions[target.expression]
        oracle = Oracle.of(target.variant, corpus, video, expression, reasoner.canvas.image)
        try:
            trace = await reasoner.trace(expression.text, settings[target.variant], oracle=oracle)
        except InputError as error:
            return Traced(target, None, str(error))
        return Traced(target, trace)

    return list(await asyncio.gather(*(one(target) for target in targets)))


def _is_complete(folder: Path, video: Video) -> bool:
    """Return True if the folder has the trace and all masks; a copy may be interrupted."""
    files = (folder / TRACE_FILE, *(mask_file(folder, frame) for frame in video.frames))
    return all(file.is_file() for file in files)


def masks_of(
    trace: Trace, frames: FrameSequence, segmenter: VideoSegmenter
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each frame's index and the union of the trace's objects in it (eqs. 6 and 7).

    Args:
        frames: The whole clip.

    Yields:
        Index and bool `[H, W]`, in the order in which the segmenter makes them.
    """
    boxes, points = _prompts(trace)
    expected = (len(boxes), *frames[trace.keyframe].shape[:2])
    for t, masks in segmenter.segment(frames, trace.keyframe, boxes, points):
        if masks.shape != expected:
            raise ValueError(
                f"{segmenter.name} returned masks of shape {masks.shape}, expected {expected}"
            )
        yield t, union(masks)


def write_masks(
    folder: Path, names: Sequence[str], masks: Iterable[tuple[int, np.ndarray]]
) -> tuple[bytes, ...]:
    """Write bool `[H, W]` masks of the named frames as `<name>.png`, single channel, 0 or 255.

    Args:
        names: Names of the frames.
        masks: Frame index and mask, each frame once.

    Returns:
        The content of each frame's file.
    """
    pngs: dict[int, bytes] = {}
    for t, mask in masks:
        pngs[t] = encode_mask(mask)
        mask_file(folder, names[t]).write_bytes(pngs[t])
    if len(pngs) != len(names):
        raise ValueError(f"the segmenter returned masks of {len(pngs)} of {len(names)} frames")
    return tuple(pngs[t] for t in range(len(names)))


def write_expression(
    target: Target,
    video: Video,
    trace: Trace,
    segmenter: VideoSegmenter,
    frames: FrameSequence,
    store: MaskStore | None = None,
) -> None:
    """Segment one expression, and write its masks and trace in one step. Raises InputError.

    The trace also has `segment_seconds`: the time from the first frame that is read to the last
    mask that is written. Masks from the store keep the seconds in which they were made.

    Args:
        store: Has the masks of equal prompts; gets those that it lacks.
    """
    folder = Path(target.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f"{PARTIAL}{folder.name}"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        masks = _masks_in(partial, video.frames, trace, segmenter, frames, store)
        more = {
            "video": video.id,
            "expression_id": target.expression,
            "keyframe_name": video.frames[trace.keyframe],
            "n_frames": len(video.frames),
            "source_size": list(masks.size),
            "segmenter": segmenter.name,
            "segment_seconds": round(masks.seconds, 4),
        }
        text = json.dumps(as_dict(trace, **more), ensure_ascii=False, indent=1)
        (partial / TRACE_FILE).write_text(text + "\n", encoding="utf-8")
        if folder.exists():  # incomplete: partly removed or copied, or not a prediction
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _masks_in(
    folder: Path,
    names: Sequence[str],
    trace: Trace,
    segmenter: VideoSegmenter,
    frames: FrameSequence,
    store: MaskStore | None,
) -> StoredMasks:
    """Write the masks of a trace as `write_masks` does, and return them."""
    key = None
    if store is not None:
        key = masks_key(segmenter, frames, trace.keyframe, *_prompts(trace))
        masks = store.get(key)
        if masks is not None:
            for name, png in zip(names, masks.pngs, strict=True):
                mask_file(folder, name).write_bytes(png)
            return masks
    started = time.perf_counter()
    pngs = write_masks(folder, names, masks_of(trace, frames, segmenter))
    seconds = time.perf_counter() - started
    height, width = frames[trace.keyframe].shape[:2]
    masks = StoredMasks(pngs, (height, width), seconds)
    if store is not None:
        store.put(key, masks)
    return masks


def _prompts(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes `[N, 4]` and points `[N, 2]` in source pixels."""
    return np.reshape(trace.boxes_source, (-1, 4)), np.reshape(trace.points_source, (-1, 2))


def video_clip(corpus: Corpus, video: Video) -> VideoClip:
    """Return the video for the reasoning."""
    return VideoClip(video.id, len(video.frames), lambda index: _frame(corpus, video, index))


def video_frames(corpus: Corpus, video: Video) -> ClipFrames:
    """Return the video for the segmenter, which reads frames on request."""
    return ClipFrames(
        len(video.frames),
        lambda index: _frame(corpus, video, index),
        lambda index: corpus.frame_path(video.id, video.frames[index]),
    )


def _frame(corpus: Corpus, video: Video, index: int) -> np.ndarray:
    try:
        return corpus.frame(video.id, video.frames[index])
    except CorpusFault as fault:
        message = f"{fault.reason} ({fault.detail})" if fault.detail else fault.reason
        raise InputError(message, file=fault.place, key=video.id) from fault


def _claim(out_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of these predictions, or check that they equal those of the folder."""
    out_dir.mkdir(parents=True, exist_ok=True)
    file = out_dir / SETTINGS_FILE
    if not file.is_file():
        write_text(file, json.dumps(dict(settings), indent=1) + "\n")
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
