"""Ground truth of one expression, as the public evaluation scripts read it, and its defects.

Scores need only masks: a missing JPEG does not change a score. A frame with a missing or unusable
mask counts 0 and stays in the mean. Every deviation from a correct corpus is a `TruthDefect`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.corpora import Corpus, CorpusFault, Expression, Video

SPARSE = ("ref-youtube-vos", "reasonvos")
"""Benchmarks that score only frames with a mask image; the others score every frame."""

_Size = tuple[int, int]


class TruthDefect(NamedTuple):
    """One defect of the ground truth."""

    file: str
    key: str
    """Place in the file, or the video and expression that need the file."""
    reason: str
    frames: int = 0
    """Number of the expression's frames whose ground truth it makes unusable."""
    effect: str = ""
    """What it changes, if not J and F."""


@dataclass
class Truth:
    """The ground truth of one expression."""

    masks_thw: np.ndarray
    """bool [T, H, W], the union of the targets."""
    scored: np.ndarray
    """bool [T]: frames that the protocol scores."""
    known: np.ndarray
    """bool [T]: frames with usable ground truth; a scored frame that is not known counts 0."""
    defects: list[TruthDefect] = field(default_factory=list)

    @cached_property
    def areas(self) -> np.ndarray:
        """Pixels of the union in each frame, int [T]."""
        return np.count_nonzero(self.masks_thw, axis=(1, 2))


def read_truth(corpus: Corpus, video: Video, expression: Expression, size: _Size) -> Truth:
    """Read the masks of an expression's targets.

    Args:
        size: (H, W) of the masks; see `clip_size`. A mask of another size is a defect.
    """
    n_frames = len(video.frames)
    height, width = size
    truth = Truth(
        np.zeros((n_frames, height, width), dtype=bool),
        np.ones(n_frames, dtype=bool),
        np.ones(n_frames, dtype=bool),
    )
    entry = f"videos.{video.id}.expressions.{expression.id}"
    defects = list(_entry_defects(corpus, video, expression, entry))
    faults: Counter[TruthDefect] = Counter()
    for anno_id in expression.anno_ids:
        list_fault = corpus.annotation_fault(video, anno_id)
        if list_fault is not None:
            faults[_defect(corpus, video, list_fault)] = 0
    for t in range(n_frames):
        for anno_id in expression.anno_ids:
            try:
                mask = corpus.published_mask(video, anno_id, t)
                if mask is not None:
                    _check_size(corpus, video, anno_id, t, mask.shape, (height, width))
                    truth.masks_thw[t] |= mask
            except CorpusFault as fault:
                if fault.reason == "missing_mask" and corpus.dataset in SPARSE:
                    truth.scored[t] = False
                    continue
                truth.known[t] = False
                faults[_defect(corpus, video, fault)] += 1
    if expression.unlabelled:
        truth.known[:] = False
    elif n_frames and not truth.scored.any():
        # public scripts skip an expression without annotated frames; here it counts 0
        truth.scored[:], truth.known[:] = True, False
        reason = f"no frame of the video has a mask image of {', '.join(expression.anno_ids)}"
        defects.append(TruthDefect(_label_folder(corpus), entry, reason, n_frames))
    elif expression.object_ids and not truth.masks_thw.any() and truth.known.all():
        reason = f"no frame shows the target ({', '.join(expression.object_ids)})"
        defects.append(TruthDefect(str(corpus.expressions_file), entry, reason))
    truth.defects = [
        *defects,
        *_merged(faults, n_frames),
        *_frame_defects(corpus, video, (height, width)),
    ]
    return truth


def targets_at(
    corpus: Corpus, video: Video, expression: Expression, frame_index: int, size: _Size
) -> dict[str, np.ndarray]:
    """Return object id -> bool [H, W] in a frame, all False if absent. Raises CorpusFault."""
    targets = {}
    for object_id, anno_id in zip(expression.object_ids, expression.anno_ids, strict=True):
        mask = corpus.published_mask(video, anno_id, frame_index)
        if mask is not None:
            _check_size(corpus, video, anno_id, frame_index, mask.shape, size)
        targets[object_id] = np.zeros(size, dtype=bool) if mask is None else mask
    return targets


@lru_cache(maxsize=4)
def clip_size(corpus: Corpus, video: Video, expression: Expression) -> _Size | None:
    """Return (H, W) of an expression's masks.

    If masks have several sizes, the most frequent one. Without masks, the size of the video's
    JPEGs, or else of other expressions' masks. None if none of these is readable.
    """
    frame = _jpeg_size(corpus, video)
    shapes = _mask_shapes(corpus, video, expression)
    first = next(shapes, None)
    if first is not None and first != frame:
        return Counter([first, *shapes]).most_common(1)[0][0]
    if frame is not None:
        return frame
    others = (_mask_shapes(corpus, video, other) for other in video.expressions)
    return next(itertools.chain.from_iterable(others), None)


def _mask_shapes(corpus: Corpus, video: Video, expression: Expression) -> Iterator[_Size]:
    for t in range(len(video.frames)):
        for anno_id in expression.anno_ids:
            try:
                mask = corpus.published_mask(video, anno_id, t)
            except CorpusFault:
                continue
            if mask is not None:
                yield mask.shape[0], mask.shape[1]


def _jpeg_size(corpus: Corpus, video: Video) -> _Size | None:
    for frame in video.frames:
        try:
            return corpus.frame_size(video.id, frame)
        except CorpusFault:
            continue
    return None


def _check_size(
    corpus: Corpus, video: Video, anno_id: str, t: int, shape: tuple[int, ...], size: _Size
) -> None:
    if shape != size:
        place = f"{corpus.root} {video.id} {video.frames[t]} object {anno_id}"
        detail = f"{shape[0]} x {shape[1]}, the other masks {size[0]} x {size[1]}"
        raise CorpusFault("mask_size", place, detail)


def _entry_defects(
    corpus: Corpus, video: Video, expression: Expression, entry: str
) -> Iterator[TruthDefect]:
    """Yield the defects of the expression's entry itself."""
    file, n = str(corpus.expressions_file), len(video.frames)
    if not video.frames:
        yield TruthDefect(file, f"videos.{video.id}.frames", "the video has no frames")
    if expression.unlabelled:
        yield TruthDefect(file, entry, "no file names the object of this expression", n)
    if sum(e.id == expression.id for e in video.expressions) > 1:
        reason = "several expressions of the video have this id, so they share one prediction"
        yield TruthDefect(file, entry, reason)
    if expression.type_id in (0, 1) and not expression.object_ids:
        reason = f"type_id is {expression.type_id}, but there is no object; 2 is without a target"
        yield TruthDefect(file, entry, reason)
    if expression.type_id == 2 and expression.object_ids:
        yield TruthDefect(file, entry, "type_id is 2 (without a target), but there are objects")


def _frame_defects(corpus: Corpus, video: Video, size: _Size) -> Iterator[TruthDefect]:
    """Yield one defect for each kind: JPEGs that are missing, broken or of another size."""
    faults: dict[TruthDefect, int] = {}
    for frame in video.frames:
        try:
            height, width = corpus.frame_size(video.id, frame)
        except CorpusFault as fault:
            reason = fault.reason
        else:
            reason = f"frame_size: {height} x {width}, the masks {size[0]} x {size[1]}"
            if (height, width) == size:
                continue
        faults[TruthDefect(str(corpus.frame_path(video.id, frame)), video.id, reason)] = 0
    yield from _merged(faults, len(video.frames))


def _merged(faults: Mapping[TruthDefect, int], n_frames: int) -> Iterator[TruthDefect]:
    """Yield one defect for each reason: the first one and the number of others.

    Args:
        faults: TruthDefect -> number of frames that it makes unusable.
    """
    kinds: dict[str, list[TruthDefect]] = {}
    for fault in faults:
        kinds.setdefault(fault.reason, []).append(fault)
    for reason, (first, *others) in kinds.items():
        more = f" (and {len(others)} more)" if others else ""
        lost = min(n_frames, sum(faults[fault] for fault in (first, *others)))
        yield first._replace(reason=reason + more, frames=lost)


def _defect(corpus: Corpus, video: Video, fault: CorpusFault) -> TruthDefect:
    """Convert a reader's fault, whose place is a file, optionally followed by a key in it."""
    reason = fault.reason + (f": {fault.detail}" if fault.detail else "")
    for file in (getattr(corpus, "masks_file", None), corpus.expressions_file, corpus.root):
        if isinstance(file, Path) and fault.place.startswith(f"{file} "):
            return TruthDefect(str(file), fault.place[len(str(file)) + 1 :], reason)
    return TruthDefect(fault.place, video.id, reason)


def _label_folder(corpus: Corpus) -> str:
    return str(getattr(corpus, "annotations_root", corpus.root / "Annotations"))
