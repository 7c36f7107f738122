"""MeViS' and ReVOS' masks: `mask_dict[annotation][frame index]`, COCO RLE or null."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipelines.corpora import rle
from data_pipelines.corpora.base import Corpus, CorpusFault, Video
from data_pipelines.corpora.mask_file import MaskFile

_T = TypeVar("_T")


class RleMasks(Corpus):
    """Corpora with a mask_dict.json."""

    _usual: tuple[str, tuple[int, int] | None] = ("", None)
    """The video that `_usual_size` was last asked of, and the answer."""

    @property
    @abc.abstractmethod
    def masks_file(self) -> Path:
        """mask_dict.json."""

    @property
    def has_masks(self) -> bool:
        return self.masks_file.is_file()

    def load(self) -> None:
        super().load()
        if self.has_masks:
            _ = self._masks

    def object_mask(self, video_id: str, anno_id: str, frame_index: int) -> np.ndarray | None:
        found = self._rle(self.video(video_id), anno_id, frame_index)
        return None if found is None else self._read(rle.decode, found, anno_id, frame_index)

    def annotation_fault(self, video: Video, anno_id: str) -> CorpusFault | None:
        try:
            self._whole(video, anno_id)
        except CorpusFault as fault:
            return fault
        return None

    def published_mask(self, video: Video, anno_id: str, frame_index: int) -> np.ndarray | None:
        listed = self._listed(video, anno_id)
        if frame_index >= len(listed):
            raise self._miscounted(video, anno_id, len(listed))
        found = listed[frame_index]
        # the scripts take anything that is false for an absent object
        return self._read(rle.decode, found, anno_id, frame_index) if found else None

    def object_area(
        self, video: Video, anno_id: str, frame_index: int, size: tuple[int, int] | None
    ) -> int:
        found = self._rle(video, anno_id, frame_index)
        if found is None:
            return 0
        area, shape = self._read(rle.area, found, anno_id, frame_index)
        # masks of one frame must be of one size also where its image is not there to tell it
        expected = size or self._usual_size(video) or shape
        self._check_size(shape, expected, video, anno_id, frame_index)
        return area

    def object_box(
        self, video: Video, anno_id: str, frame_index: int, size: tuple[int, int]
    ) -> tuple[int, int, int, int] | None:
        found = self._rle(video, anno_id, frame_index)
        if found is None:
            return None
        box, shape = self._read(rle.box, found, anno_id, frame_index)
        self._check_size(shape, size, video, anno_id, frame_index)
        return box

    def union_area(self, video: Video, anno_ids: Sequence[str], frame_index: int) -> int:
        found = [self._rle(video, anno_id, frame_index) for anno_id in anno_ids]
        return rle.union_area([f for f in found if f is not None])

    def label_bytes(self, video: Video) -> Iterator[bytes]:
        for anno_id in sorted({a for e in video.expressions for a in e.anno_ids}):
            yield self._masks.digest(anno_id)

    def _usual_size(self, video: Video) -> tuple[int, int] | None:
        """(H, W) of a clip: its first frame's that can be read, or else its first mask's."""
        if self._usual[0] != video.id:
            self._usual = (video.id, self._first_size(video))
        return self._usual[1]

    def _first_size(self, video: Video) -> tuple[int, int] | None:
        for frame in video.frames:
            try:
                return self.frame_size(video.id, frame)
            except CorpusFault:
                continue
        for anno_id in sorted({a for e in video.expressions for a in e.anno_ids}):
            for index in range(len(video.frames)):
                try:
                    found = self._rle(video, anno_id, index)
                    if found is not None:
                        return self._read(rle.area, found, anno_id, index)[1]
                except CorpusFault:
                    continue
        return None

    def _rle(self, video: Video, anno_id: str, frame_index: int) -> Any:
        return self._whole(video, anno_id)[frame_index]

    def _whole(self, video: Video, anno_id: str) -> list[Any]:
        """The masks of an annotation, one for each frame. Raises CorpusFault."""
        listed = self._listed(video, anno_id)
        if len(listed) != len(video.frames):
            raise self._miscounted(video, anno_id, len(listed))
        return listed

    def _listed(self, video: Video, anno_id: str) -> list[Any]:
        listed = self._masks.get(anno_id)
        if not isinstance(listed, list):
            place, detail = f"{self.masks_file} {anno_id}", f"named by an expression of {video.id}"
            raise CorpusFault("absent_object", place, detail)
        return listed

    def _miscounted(self, video: Video, anno_id: str, count: int) -> CorpusFault:
        detail = f"{count} masks, {len(video.frames)} frames"
        return CorpusFault("mask_count", f"{self.masks_file} {anno_id}", detail)

    def _read(self, how: Callable[[Any], _T], found: Any, anno_id: str, frame_index: int) -> _T:
        try:
            return how(found)
        except ValueError as error:
            place = f"{self.masks_file} {anno_id}[{frame_index}]"
            raise CorpusFault("bad_rle", place, str(error)) from error

    @cached_property
    def _masks(self) -> MaskFile:
        return MaskFile(self.masks_file)
