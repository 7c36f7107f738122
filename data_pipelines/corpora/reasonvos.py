"""ReasonVOS in its published layout. It is for evaluation only and has a single split.

ROOT/JPEGImages/<video>/<frame>.jpg
ROOT/Annotations/<source>_<video>_<object>/<frame>.png     non-zero = the object
ROOT/meta_expressions.json                       expressions are a list
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_pipelines.corpora.corpus import Corpus, Expression, Video, pair_ids
from data_pipelines.corpora.json_node import Node, check_path_part, read_json
from data_pipelines.corpora.label_png import file_bytes, read_labels


class ReasonVos(Corpus):
    """Reader of ReasonVOS."""

    dataset: ClassVar[str] = "reasonvos"
    splits: ClassVar[tuple[str, ...]] = ("valid", "test")
    """The published corpus has no named split; both names are the whole corpus."""

    @property
    def expressions_file(self) -> Path:
        return self.root / "meta_expressions.json"

    @property
    def frames_root(self) -> Path:
        return self.root / "JPEGImages"

    @property
    def has_masks(self) -> bool:
        return (self.root / "Annotations").is_dir()

    def object_mask(self, video_id: str, anno_id: str, frame_index: int) -> np.ndarray | None:
        frame = self.video(video_id).frames[frame_index]
        return read_labels(f"{self.root}/Annotations/{anno_id}/{frame}.png") > 0

    def label_bytes(self, video: Video) -> Iterator[bytes]:
        folders = (f"{self.root}/Annotations/{anno}" for anno in video.anno_ids)
        return file_bytes(f"{f}/{frame}.png" for f in folders for frame in video.frames)

    def _read_videos(self) -> list[Video]:
        top = Node(read_json(self.expressions_file), self.expressions_file)
        return self.keep(top["videos"].items(), self._video)

    def _video(self, name: str, node: Node) -> Video:
        name = Node(name, node.file, node.key).path_part()
        source = node["source"].of(str)
        frames = self.read_frames(node["frames"])
        listed = ((str(i), e) for i, e in enumerate(node["expressions"].elements()))
        expressions = self.read_expressions(
            name, listed, lambda _, item: _expression(item, f"{source}_{name}")
        )
        return Video(name, frames, expressions)


def _expression(item: Node, prefix: str) -> Expression:
    objects = item["obj_id"].identifiers()
    annos = [check_path_part(f"{prefix}_{o}", item.file, f"{item.key}.obj_id") for o in objects]
    object_ids, annos_of = pair_ids(objects, annos)
    text = item["exp_text"].of(str)
    return Expression(item["exp_id"].identifier(), text, object_ids, annos_of)
