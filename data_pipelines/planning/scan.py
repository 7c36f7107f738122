"""What the plan needs to know of a corpus: areas of masks, frames that are there, defects.

Every mask is decoded once, no JPEG is: its header gives its size. A defect costs what it touches
and no more: a frame without a JPEG only itself, an annotation the expressions that name it, an
unreadable label image its video's expressions. Masks that belong to another frame are looked for by
`alignment.py`, if the recipe says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.corpora import Corpus, CorpusFault, Video
from data_pipelines.geometry import box_on_canvas
from data_pipelines.planning.mask_alignment import (
    LEAST_MASKS,
    NotChecked,
    Propagator,
    sam2_suspects,
    suspects,
)
from rcot_rl.recipe.alignment import AlignmentSection


@dataclass(frozen=True)
class Defect:
    """A fault of the corpus, as the manifest reports it."""

    dataset: str
    video: str
    expression_id: str
    """Empty: the fault is the frame's or the video's."""
    reason: str
    place: str
    detail: str


@dataclass(frozen=True)
class ExpressionFacts:
    """What a usable expression offers. Arrays have one entry a frame."""

    id: str
    n_objects: int
    union_area_t: np.ndarray
    """int64 [T]: source pixels."""
    visible_t: np.ndarray
    """int16 [T]: how many of its objects have any pixel."""
    thin_t: np.ndarray
    """bool [T]: the box of a visible object would have no area on the canvas."""


@dataclass(frozen=True)
class VideoFacts:
    """One scanned video. `corpus` is the position of its corpus in the recipe."""

    corpus: int
    dataset: str
    video: str
    usable_t: np.ndarray
    """bool [T]: the frame's JPEG is there."""
    expressions: tuple[ExpressionFacts, ...]
    n_expressions: int
    """With the quarantined ones."""
    defects: tuple[Defect, ...]
    digest: str = ""
    """Of its sentences, masks and frames' sizes: changes when the corpus does."""
    spoiled: frozenset[int] = frozenset()
    """Frames that do not decode, as far as that is known. Rows skip them; the order in which
    others are drawn does not change."""


def scan_video(
    corpus: Corpus,
    corpus_index: int,
    video: Video,
    canvas: int,
    alignment: AlignmentSection | None = None,
    propagator: Propagator | None = None,
) -> VideoFacts:
    """Facts of one video; never raises CorpusFault, but lists it.

    canvas: its side in pixels; decides which objects are too thin to have a box. alignment: how
    to look for masks of other frames; None: not at all. propagator: for its level `sam2`.
    """
    scan = _Scan(corpus, video, canvas, alignment or AlignmentSection(), propagator)
    unread = [b for b in corpus.faults if b.video == video.id and b.expression_id]
    for bad in unread:
        scan.note(bad.fault, bad.expression_id)
    return VideoFacts(
        corpus=corpus_index,
        dataset=corpus.dataset,
        video=video.id,
        usable_t=np.array([s is not None for s in scan.sizes], dtype=bool),
        expressions=scan.expressions(),
        n_expressions=len(video.expressions) + len(unread),
        defects=tuple(scan.defects),
        digest=corpus.digest(video),
    )


def unread_videos(corpus: Corpus, corpus_index: int) -> list[VideoFacts]:
    """Facts of the videos whose entry in the metadata cannot be read: a defect each."""
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


def _defect(corpus: Corpus, video: str, fault: CorpusFault, expression_id: str) -> Defect:
    return Defect(corpus.dataset, video, expression_id, fault.reason, fault.place, fault.detail)


class _Scan:
    def __init__(
        self,
        corpus: Corpus,
        video: Video,
        canvas: int,
        alignment: AlignmentSection,
        propagator: Propagator | None,
    ) -> None:
        self.corpus, self.video, self.canvas = corpus, video, canvas
        self.alignment, self.propagator = alignment, propagator
        self.defects: list[Defect] = []
        self.sizes = [self._size(f) for f in video.frames]
        self.broken: dict[str, CorpusFault] = {}

    def expressions(self) -> tuple[ExpressionFacts, ...]:
        """Facts of the expressions that no defect touches."""
        objects = sorted({e.anno_ids for e in self.video.expressions if e.anno_ids})
        annos = sorted({a for group in objects for a in group})
        n_frames = len(self.video.frames)
        union = {group: np.zeros(n_frames, dtype=np.int64) for group in objects}
        visible = {anno: np.zeros(n_frames, dtype=bool) for anno in annos}
        thin = {anno: np.zeros(n_frames, dtype=bool) for anno in annos}
        sizes = {anno: np.zeros(n_frames, dtype=np.int64) for anno in annos}
        for index in range(n_frames):
            areas = self._areas(annos, index)
            for anno, area in areas.items():
                sizes[anno][index] = area
                visible[anno][index] = area > 0
                thin[anno][index] = self._is_thin(area, anno, index)
            for group in objects:
                there = [a for a in group if areas.get(a)]
                union[group][index] = self._union(there, areas, index)
        self._look_for_strangers(sizes)
        return self._collect(union, visible, thin)

    def _look_for_strangers(self, sizes: dict[str, np.ndarray]) -> None:
        """Objects whose masks belong elsewhere count as broken: no expression may name them."""
        sound = {anno: areas for anno, areas in sizes.items() if anno not in self.broken}
        if self.alignment.level == "off" or len(self.sizes) < LEAST_MASKS:
            return
        there = np.array([t for t, size in enumerate(self.sizes) if size is not None], dtype=int)
        try:
            found = suspects(self.corpus, self.video, sound, self.alignment, there)
            if self.alignment.level == "sam2" and self.propagator is not None:
                known = {s.anno_id for s in found}
                rest = {a: areas for a, areas in sound.items() if a not in known}
                found += sam2_suspects(
                    self.corpus, self.video, rest, self.alignment, self.propagator, there
                )
        except NotChecked as error:
            place = f"{self.corpus.root} {self.video.id}"
            self.note(CorpusFault("alignment_not_checked", place, str(error)), "")
            return
        for suspect in found:
            place = f"{self.corpus.root} {self.video.id} object {suspect.anno_id}"
            self.broken[suspect.anno_id] = CorpusFault(suspect.code, place, suspect.detail)

    def _union(self, annos: list[str], areas: dict[str, int], index: int) -> int:
        """Pixels of the union of those objects, looked for only where they may overlap."""
        if len(annos) < 2 or self.corpus.disjoint:
            return sum(areas[a] for a in annos)
        try:
            return self.corpus.union_area(self.video, annos, index)
        except CorpusFault as fault:
            self.broken |= dict.fromkeys(annos, fault)
            return 0

    def _is_thin(self, area: int, anno: str, index: int) -> bool:
        """Whether the object's box has no area on the canvas; only few pixels can mean so."""
        size = self.sizes[index]
        if size is None or not 0 < area <= _most_of_thin(size, self.canvas):
            return False
        box = self.corpus.object_box(self.video, anno, index, size)
        assert box is not None  # it has pixels
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
        """Pixels of every object without a fault."""
        found = {}
        size = self.sizes[index]
        for anno in annos:
            if anno in self.broken:
                continue
            try:
                found[anno] = self.corpus.object_area(self.video, anno, index, size)
            except CorpusFault as fault:
                self.broken[anno] = fault
        return found

    def _size(self, frame: str) -> tuple[int, int] | None:
        try:
            return self.corpus.frame_size(self.video.id, frame)
        except CorpusFault as fault:
            self.note(fault, "")
            return None

    def note(self, fault: CorpusFault, expression_id: str) -> None:
        """List a fault as a defect."""
        self.defects.append(_defect(self.corpus, self.video.id, fault, expression_id))


def _most_of_thin(size: tuple[int, int], canvas: int) -> int:
    """The most pixels of an object whose box has no area on the canvas, in a frame of (H, W): such
    a box is less than one canvas pixel wide, or high. 0 where every pixel has an area."""
    height, width = size
    return max((-(-width // canvas) - 1) * height, (-(-height // canvas) - 1) * width)
