"""Ref-YouTube-VOS in its published layout.

    ROOT/meta_expressions/{train,valid,test}/meta_expressions.json
    ROOT/{train,valid}/JPEGImages/<video>/<frame>.jpg
    ROOT/train/Annotations/<video>/<frame>.png      palette index = object id

Each expression has one object (`obj_id`, a string, absent in valid). Videos of the valid file that
are also in the test file are not evaluated and are skipped.

Masks of valid were published later, in a layout that no public document describes. Three are read,
and each expression may have another one:

    valid/Annotations/<video>/<expression_id>/<frame>.png   non-zero = the object, as predictions
    valid/Annotations/<video>/<frame>.png                   index = object id, as in train, with
                                                            `obj_id` in meta_expressions.json or
                                                            `expressions` in the objects of
                                                            valid/meta.json

An expression without any of them is `unlabelled`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_pipelines.corpora.corpus import (
    Corpus,
    CorpusFault,
    Expression,
    Video,
    id_order,
)
from data_pipelines.corpora.json_node import Node, check_path_part, read_json
from data_pipelines.corpora.label_png import file_bytes, read_labels


class RefYoutubeVos(Corpus):
    """Reader of Ref-YouTube-VOS."""

    dataset: ClassVar[str] = "ref-youtube-vos"
    splits: ClassVar[tuple[str, ...]] = ("train", "valid", "test")

    @property
    def expressions_file(self) -> Path:
        return self.root / "meta_expressions" / self.split / "meta_expressions.json"

    @property
    def frames_root(self) -> Path:
        # test videos lie among the valid ones
        folder = "valid" if self.split == "test" else self.split
        return self.root / folder / "JPEGImages"

    @cached_property
    def annotations_root(self) -> Path:
        """The folder of label images."""
        return self.frames_root.parent / "Annotations"

    @property
    def has_masks(self) -> bool:
        return self.annotations_root.is_dir() and any(
            e.object_ids for v in self.videos() for e in v.expressions
        )

    disjoint: ClassVar[bool] = True
    _areas_cache: tuple[str, dict[int, tuple[tuple[int, int], np.ndarray]]] = ("", {})
    """The last video, and frame -> `_areas`."""
    _indices_cache: tuple[str, list[int]] = ("", [])
    """The last video, and its `_named_indices`."""
    _anywhere_cache: tuple[str, dict[int, bool]] = ("", {})
    """The last video, and index -> `_is_anywhere`."""

    def label_image(self, video: Video, frame_index: int) -> np.ndarray:
        """Return a frame's label image, uint8 [H, W], read-only. Raises CorpusFault."""
        return read_labels(self._labels(video, frame_index))

    def object_mask(self, video_id: str, anno_id: str, frame_index: int) -> np.ndarray | None:
        video = self.video(video_id)
        if _is_folder(anno_id):
            return read_labels(self._mask_file(anno_id, video, frame_index)) > 0
        labels = self.label_image(video, frame_index)
        return labels == self._index(video_id, anno_id)

    def _mask_file(self, folder: str, video: Video, frame_index: int) -> str:
        """Return the path of a mask of one expression."""
        return f"{self.annotations_root}/{folder}/{video.frames[frame_index]}.png"

    def object_area(
        self, video: Video, anno_id: str, frame_index: int, size: tuple[int, int] | None
    ) -> int:
        if _is_folder(anno_id):
            return super().object_area(video, anno_id, frame_index, size)
        shape, areas = self._areas(video, frame_index)
        index = self._index(video.id, anno_id)
        if size is not None:
            self._check_size(shape, size, video, anno_id, frame_index)
        if not areas[index] and not self._is_anywhere(video, index):
            place = f"{self.expressions_file} {video.id} {anno_id}"
            raise CorpusFault("absent_object", place, "no label image of the video has it")
        return int(areas[index])

    def _is_anywhere(self, video: Video, index: int) -> bool:
        """Return True if some label image of the video has this index, or is unreadable."""
        if self._anywhere_cache[0] != video.id:
            self._anywhere_cache = (video.id, {})
        known = self._anywhere_cache[1]
        if index not in known:
            frames = range(len(video.frames))
            try:
                known[index] = any(self._areas(video, t)[1][index] for t in frames)
            except CorpusFault:
                known[index] = True
        return known[index]

    def _areas(self, video: Video, frame_index: int) -> tuple[tuple[int, int], np.ndarray]:
        """Return (H, W) and int64 [256] areas of a frame's named indices. Raises CorpusFault."""
        if self._areas_cache[0] != video.id:
            self._areas_cache = (video.id, {})
        counted = self._areas_cache[1]
        if frame_index not in counted:
            labels = self.label_image(video, frame_index)
            areas = np.zeros(256, dtype=np.int64)
            for index in self._named_indices(video):
                areas[index] = np.count_nonzero(labels == index)
            counted[frame_index] = labels.shape, areas
        return counted[frame_index]

    def _named_indices(self, video: Video) -> list[int]:
        """Return the palette indices of the objects that a video's expressions name.

        Counting each is several times cheaper than a histogram of all indices.
        """
        if self._indices_cache[0] != video.id:
            indices = set()
            for anno_id in video.anno_ids:
                with suppress(CorpusFault):
                    indices.add(self._index(video.id, anno_id))
            self._indices_cache = (video.id, sorted(indices))
        return self._indices_cache[1]

    def _labels(self, video: Video, frame_index: int) -> str:
        return f"{self.annotations_root}/{video.id}/{video.frames[frame_index]}.png"

    def _index(self, video_id: str, anno_id: str) -> int:
        # 0 is the background, and a PNG has no index above 255
        number = anno_id.lstrip("0") if anno_id.isascii() and anno_id.isdigit() else ""
        if not number or len(number) > 3 or int(number) > 255:
            raise CorpusFault("absent_object", f"{self.expressions_file} {video_id} {anno_id}")
        return int(number)

    def label_bytes(self, video: Video) -> Iterator[bytes]:
        times = range(len(video.frames))
        yield from file_bytes(self._labels(video, t) for t in times)
        folders = filter(_is_folder, video.anno_ids)
        yield from file_bytes(self._mask_file(f, video, t) for f in folders for t in times)

    def anno_id(self, video: Video, object_id: str) -> str | None:
        return super().anno_id(video, object_id) or object_id

    def _read_videos(self) -> list[Video]:
        skipped = self._test_videos() if self.split == "valid" else frozenset()
        targets = self._targets_from_meta() if self.split == "valid" else {}
        top = Node(read_json(self.expressions_file), self.expressions_file)
        entries = [(name, node) for name, node in top["videos"].items() if name not in skipped]
        return self.keep(entries, lambda name, node: self._video(name, node, targets.get(name, {})))

    def _video(self, name: str, node: Node, targets: Mapping[str, str]) -> Video:
        name = Node(name, node.file, node.key).path_part()
        frames = self.read_frames(node["frames"])
        labelled = self.split == "train"
        expressions = self.read_expressions(
            name,
            node["expressions"].items(),
            lambda i, e: _expression(i, e, labelled, targets.get(i), self._folder(name, i)),
        )
        return Video(name, frames, expressions)

    def _folder(self, video: str, expression: str) -> str | None:
        """Return the folder of an expression's masks below `annotations_root`, if there is one."""
        if self.split == "train":
            return None
        name = check_path_part(f"{video}/{expression}", self.expressions_file, "expressions")
        return name if (self.annotations_root / name).is_dir() else None

    def _targets_from_meta(self) -> dict[str, dict[str, str]]:
        """Return video -> expression -> object, as far as valid/meta.json lists them."""
        path = self.root / "valid" / "meta.json"
        if not path.is_file():
            return {}
        return {
            video: {
                expression.identifier(): object_id
                for object_id, entry in node["objects"].items()
                if "expressions" in entry
                for expression in entry["expressions"].elements()
            }
            for video, node in Node(read_json(path), path)["videos"].items()
        }

    def _test_videos(self) -> frozenset[str]:
        path = self.root / "meta_expressions" / "test" / "meta_expressions.json"
        if not path.is_file():
            return frozenset()
        return frozenset(name for name, _ in Node(read_json(path), path)["videos"].items())


def _is_folder(anno_id: str) -> bool:
    """Return True if an annotation is a folder of masks, `<video>/<expression_id>`."""
    return "/" in anno_id


def _expression(
    name: str, node: Node, labelled: bool, target: str | None, folder: str | None
) -> Expression:
    """Read an expression.

    Args:
        target: Its object in valid/meta.json.
        folder: Its folder of masks.
    """
    objects: tuple[str, ...] = () if target is None else (target,)
    if folder is not None:
        # the folder is the object: object ids of other files may have no mask
        return Expression(name, node["exp"].of(str), (name,), (folder,))
    if labelled or "obj_id" in node:
        # the corpus has one object per expression; lists are accepted too
        objects = tuple(sorted(set(node["obj_id"].identifiers()), key=id_order))
    elif target is None:
        return Expression(name, node["exp"].of(str), (), unlabelled=True)
    return Expression(name, node["exp"].of(str), objects, objects)
