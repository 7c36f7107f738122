"""Scan a corpus for the plan: mask areas, available frames, defects.

Every mask is decoded once. JPEGs are not decoded: their header gives the size. A defect affects as
little as possible: a missing JPEG its frame, a bad annotation the expressions that name it, an
unreadable label image the expressions of its video. `mask_alignment.py` finds masks that belong to
another frame, if the recipe asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.corpora import Corpus, CorpusFault, Video
from data_pipelines.geometry import box_on_canvas
from data_pipelines.planning.mask_alignment import (
    MIN_MASKS,
    AlignmentNotChecked,
    sam2_suspects,
    suspects,
)
from rcot_rl.recipe.data_section import AlignmentSection

if TYPE_CHECKING:
    from rcot_rl.segmentation.segmenter import VideoSegmenter


@dataclass(frozen=True)
class CorpusDefect:
    """A defect of the corpus, as the manifest lists it."""

    dataset: str
    video: str
    expression_id: str
    """Empty if the defect is the frame's or the video's."""
    reason: str
    place: str
    detail: str


@dataclass(frozen=True)
class ExpressionFacts:
    """Facts of a usable expression. Arrays have one entry per frame."""

    id: str
    n_objects: int
    union_area_t: np.ndarray
    """int64 [T]: area of the union of its objects, in source pixels."""
    visible_t: np.ndarray
    """int16 [T]: number of its objects with at least one pixel."""
    thin_t: np.ndarray
    """bool [T]: some visible object's box would have no area on the canvas."""


@dataclass(frozen=True)
class VideoFacts:
    """One scanned video. `corpus` is the position of its corpus in the recipe."""

    corpus: int
    dataset: str
    video: str
    usable_t: np.ndarray
    """bool [T]: the frame's JPEG exists and is complete."""
    expressions: tuple[ExpressionFacts, ...]
    n_expressions: int
    """Including the quarantined ones."""
    defects: tuple[CorpusDefect, ...]
    digest: str = ""
    """Changes when the video's expressions, masks or frame sizes change."""
    undecodable: frozenset[int] = frozenset()
    """Frames known not to decode. Rows skip them; the order of the other candidates is the same."""


def scan_video(
    corpus: Corpus,
    corpus_index: int,
    video: Video,
    canvas: int,
    alignment: AlignmentSection | None = None,
    propagator: VideoSegmenter | None = None,
) -> VideoFacts:
    """Return the facts of one video; defects are listed, not raised.

    Args:
        canvas: Side in pixels; decides which objects are too thin to have a box.
        alignment: How to look for masks of other frames; None: the default.
        propagator: The segmenter for level `sam2`.
    """
    scan = _Scan(corpus, video, canvas, alignment or AlignmentSection(), propagator)
    bad_entries = [b for b in corpus.faults if b.video == video.id and b.expression_id]
    for bad in bad_entries:
        scan.note(bad.fault, bad.expression_id)
    return VideoFacts(
        corpus=corpus_index,
        dataset=corpus.dataset,
        video=video.id,
        usable_t=np.array([s is not None for s in scan.sizes], dtype=bool),
        expressions=scan.expressions(),
        n_expressions=len(video.expressions) + len(bad_entries),
        defects=tuple(scan.defects),
        digest=corpus.digest(video),
    )


def unreadable_videos(corpus: Corpus, corpus_index: int) -> list[VideoFacts]:
    """Return facts, with one defect each, of the videos whose metadata entry is unreadable."""
    return [
        VideoFacts(
            corpus=corpus_index,
            dataset=corpus.dataset,
            video=bad.video,
            usable_t=np.zeros(0, dtype=bool),
            expressions=(),
            n_expressions=1,
            defects=(_defect(corpus, bad.video, bad.fault, ""),),
        )
        for bad in corpus.faults
        if not bad.expression_id
    ]


def _defect(corpus: Corpus, video: str, fault: CorpusFault, expression_id: str) -> CorpusDefect:
    return CorpusDefect(
        corpus.dataset, video, expression_id, fault.reason, fault.place, fault.detail
    )


class _Scan:
    def __init__(
        self,
        corpus: Corpus,
        video: Video,
        canvas: int,
        alignment: AlignmentSection,
        propagator: VideoSegmenter | None,
    ) -> None:
        self.corpus, self.video, self.canvas = corpus, video, canvas
        self.alignment, self.propagator = alignment, propagator
        self.defects: list[CorpusDefect] = []
        self.sizes = [self._size(f) for f in video.frames]
        self.broken: dict[str, CorpusFault] = {}

    def expressions(self) -> tuple[ExpressionFacts, ...]:
        """Return the facts of the expressions that no defect affects."""
        objects = sorted({e.anno_ids for e in self.video.expressions if e.anno_ids})
        annos = self.video.anno_ids
        n_frames = len(self.video.frames)
        union = {group: np.zeros(n_frames, dtype=np.int64) for group in objects}
        visible = {anno: np.zeros(n_frames, dtype=bool) for anno in annos}
        thin = {anno: np.zeros(n_frames, dtype=bool) for anno in annos}
        areas_of = {anno: np.zeros(n_frames, dtype=np.int64) for anno in annos}
        for index in range(n_frames):
            areas = self._areas(annos, index)
            for anno, area in areas.items():
                areas_of[anno][index] = area
                visible[anno][index] = area > 0
                thin[anno][index] = self._is_thin(area, anno, index)
            for group in objects:
                present = [a for a in group if areas.get(a)]
                union[group][index] = self._union(present, areas, index)
        self._check_alignment(areas_of)
        return self._collect(union, visible, thin)

    def _check_alignment(self, areas_of: dict[str, np.ndarray]) -> None:
        """Mark objects whose masks belong elsewhere as broken."""
        sound = {anno: areas for anno, areas in areas_of.items() if anno not in self.broken}
        if self.alignment.level == "off" or len(self.sizes) < MIN_MASKS:
            return
        available = np.array(
            [t for t, size in enumerate(self.sizes) if size is not None], dtype=int
        )
        try:
            misaligned = suspects(self.corpus, self.video, sound, self.alignment, available)
            if self.alignment.level == "sam2" and self.propagator is not None:
                known = {s.anno_id for s in misaligned}
                rest = {a: areas for a, areas in sound.items() if a not in known}
                misaligned += sam2_suspects(
                    self.corpus, self.video, rest, self.alignment, self.propagator, available
                )
        except AlignmentNotChecked as error:
            place = f"{self.corpus.root} {self.video.id}"
            self.note(CorpusFault("alignment_not_checked", place, str(error)), "")
            return
        for suspect in misaligned:
            place = f"{self.corpus.root} {self.video.id} object {suspect.anno_id}"
            self.broken[suspect.anno_id] = CorpusFault(suspect.code, place, suspect.detail)

    def _union(self, annos: list[str], areas: dict[str, int], index: int) -> int:
        """Return the area of the union of objects; computed only if they can overlap."""
        if len(annos) < 2 or self.corpus.disjoint:
            return sum(areas[a] for a in annos)
        try:
            return self.corpus.union_area(self.video, annos, index)
        except CorpusFault as fault:
            self.broken |= dict.fromkeys(annos, fault)
            return 0

    def _is_thin(self, area: int, anno: str, index: int) -> bool:
        """Return True if the object's box has no area on the canvas."""
        size = self.sizes[index]
        if size is None or not 0 < area <= _max_thin_area(size, self.canvas):
            return False
        box = self.corpus.object_box(self.video, anno, index, size)
        assert box is not None  # its area is not 0
        x1, y1, x2, y2 = box_on_canvas(box, size, self.canvas)
        return x1 == x2 or y1 == y2

    def _collect(
        self,
        union: dict[tuple[str, ...], np.ndarray],
        visible: dict[str, np.ndarray],
        thin: dict[str, np.ndarray],
    ) -> tuple[ExpressionFacts, ...]:
        n_frames = len(self.video.frames)
        out = []
        for expression in self.video.expressions:
            fault = next((self.broken[a] for a in expression.anno_ids if a in self.broken), None)
            if fault is not None:
                self.note(fault, expression.id)
                continue
            group = expression.anno_ids
            area = union[group] if group else np.zeros(n_frames, dtype=np.int64)
            count = np.zeros(n_frames, dtype=np.int16)
            some_thin = np.zeros(n_frames, dtype=bool)
            for anno in group:
                count += visible[anno]
                some_thin |= thin[anno]
            out.append(ExpressionFacts(expression.id, len(group), area, count, some_thin))
        return tuple(out)

    def _areas(self, annos: list[str], index: int) -> dict[str, int]:
        """Return the pixels of every object without a fault."""
        areas = {}
        size = self.sizes[index]
        for anno in annos:
            if anno in self.broken:
                continue
            try:
                areas[anno] = self.corpus.object_area(self.video, anno, index, size)
            except CorpusFault as fault:
                self.broken[anno] = fault
        return areas

    def _size(self, frame: str) -> tuple[int, int] | None:
        try:
            return self.corpus.frame_size(self.video.id, frame)
        except CorpusFault as fault:
            self.note(fault, "")
            return None

    def note(self, fault: CorpusFault, expression_id: str) -> None:
        """List a fault among the defects."""
        self.defects.append(_defect(self.corpus, self.video.id, fault, expression_id))


def _max_thin_area(size: tuple[int, int], canvas: int) -> int:
    """Return the maximum area of an object of an [H, W] frame whose box has no area on the canvas.

    Such a box is less than one canvas pixel wide or high. 0 if the canvas is not smaller.
    """
    height, width = size
    return max((-(-width // canvas) - 1) * height, (-(-height // canvas) - 1) * width)
