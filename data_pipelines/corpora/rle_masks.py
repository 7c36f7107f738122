"""Masks of MeViS and ReVOS: `mask_dict[annotation][frame index]`, COCO RLE or null."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipelines.corpora import rle
from data_pipelines.corpora.corpus import Corpus, CorpusFault, Video
from data_pipelines.corpora.mask_file import MaskFile

_T = TypeVar("_T")


class RleMasks(Corpus):
    """A corpus with a mask_dict.json."""

    _clip_size: tuple[str, tuple[int, int] | None] = ("", None)
    """Cache of `_size_of_clip`: the last video and its size."""

    @property
    @abc.abstractmethod
    def masks_file(self) -> Path:
        """Path of mask_dict.json."""

    @property
    def has_masks(self) -> bool:
        return self.masks_file.is_file()

    def load(self) -> None:
        super().load()
        if self.has_masks:
            _ = self._masks

    def object_mask(self, video_id: str, anno_id: str, frame_index: int) -> np.ndarray | None:
        mask_rle = self._rle(self.video(video_id), anno_id, frame_index)
        if mask_rle is None:
            return None
        return self._read(rle.decode, mask_rle, anno_id, frame_index)

    def annotation_fault(self, video: Video, anno_id: str) -> CorpusFault | None:
        try:
            self._frame_masks(video, anno_id)
        except CorpusFault as fault:
            return fault
        return None

    def published_mask(self, video: Video, anno_id: str, frame_index: int) -> np.ndarray | None:
        masks = self._masks_of(video, anno_id)
        if frame_index >= len(masks):
            raise self._miscounted(video, anno_id, len(masks))
        mask_rle = masks[frame_index]
        # the public scripts treat every falsy value as an absent object
        return self._read(rle.decode, mask_rle, anno_id, frame_index) if mask_rle else None

    def object_area(
        self, video: Video, anno_id: str, frame_index: int, size: tuple[int, int] | None
    ) -> int:
        mask_rle = self._rle(video, anno_id, frame_index)
        if mask_rle is None:
            return 0
        area, shape = self._read(rle.area, mask_rle, anno_id, frame_index)
        # if the frame's JPEG is missing, compare with the size of the clip
        expected = size or self._size_of_clip(video) or shape
        self._check_size(shape, expected, video, anno_id, frame_index)
        return area

    def object_box(
        self, video: Video, anno_id: str, frame_index: int, size: tuple[int, int]
    ) -> tuple[int, int, int, int] | None:
        mask_rle = self._rle(video, anno_id, frame_index)
        if mask_rle is None:
            return None
        box, shape = self._read(rle.box, mask_rle, anno_id, frame_index)
        self._check_size(shape, size, video, anno_id, frame_index)
        return box

    def union_area(self, video: Video, anno_ids: Sequence[str], frame_index: int) -> int:
        rles = [self._rle(video, anno_id, frame_index) for anno_id in anno_ids]
        return rle.union_area([r for r in rles if r is not None])

    def label_bytes(self, video: Video) -> Iterator[bytes]:
        for anno_id in video.anno_ids:
            yield self._masks.digest(anno_id)

    def _size_of_clip(self, video: Video) -> tuple[int, int] | None:
        """Return (H, W) of the first readable frame, or else of the first readable mask."""
        if self._clip_size[0] != video.id:
            self._clip_size = (video.id, self._first_size(video))
        return self._clip_size[1]

    def _first_size(self, video: Video) -> tuple[int, int] | None:
        for frame in video.frames:
            try:
                return self.frame_size(video.id, frame)
            except CorpusFault:
                continue
        for anno_id in video.anno_ids:
            for index in range(len(video.frames)):
                try:
                    mask_rle = self._rle(video, anno_id, index)
                    if mask_rle is not None:
                        return self._read(rle.area, mask_rle, anno_id, index)[1]
                except CorpusFault:
                    continue
        return None

    def _rle(self, video: Video, anno_id: str, frame_index: int) -> Any:
        return self._frame_masks(video, anno_id)[frame_index]

    def _frame_masks(self, video: Video, anno_id: str) -> list[Any]:
        """Return the masks of an annotation, one per frame; CorpusFault if the count differs."""
        masks = self._masks_of(video, anno_id)
        if len(masks) != len(video.frames):
            raise self._miscounted(video, anno_id, len(masks))
        return masks

    def _masks_of(self, video: Video, anno_id: str) -> list[Any]:
        masks = self._masks.get(anno_id)
        if not isinstance(masks, list):
            place, detail = f"{self.masks_file} {anno_id}", f"named by an expression of {video.id}"
            raise CorpusFault("absent_object", place, detail)
        return masks

    def _miscounted(self, video: Video, anno_id: str, count: int) -> CorpusFault:
        detail = f"{count} masks, {len(video.frames)} frames"
        return CorpusFault("mask_count", f"{self.masks_file} {anno_id}", detail)

    def _read(
        self, reader: Callable[[Any], _T], mask_rle: Any, anno_id: str, frame_index: int
    ) -> _T:
        try:
            return reader(mask_rle)
        except ValueError as error:
            place = f"{self.masks_file} {anno_id}[{frame_index}]"
            raise CorpusFault("bad_rle", place, str(error)) from error

    @cached_property
    def _masks(self) -> MaskFile:
        return MaskFile(self.masks_file)
