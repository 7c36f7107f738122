"""MeViS in its published layout.

    ROOT/{train,valid_u,valid}/JPEGImages/<video>/<frame>.jpg
    ROOT/{train,valid_u,valid}/meta_expressions.json
    ROOT/{train,valid_u}/mask_dict.json              {annotation: [RLE | null per frame]}

An expression lists objects (`obj_id`, unique in the video) and annotations (`anno_id`, unique in
the corpus) in parallel. `valid` has neither, and no masks: it is scored by the benchmark's server.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from data_pipelines.corpora.corpus import Corpus, Expression, Video, pair_ids
from data_pipelines.corpora.json_node import Node, read_json
from data_pipelines.corpora.rle_masks import RleMasks


class Mevis(RleMasks):
    """Reader of MeViS."""

    dataset: ClassVar[str] = "mevis"
    splits: ClassVar[tuple[str, ...]] = ("train", "valid_u", "valid")

    @property
    def expressions_file(self) -> Path:
        return self.root / self.split / "meta_expressions.json"

    @property
    def frames_root(self) -> Path:
        return self.root / self.split / "JPEGImages"

    @property
    def masks_file(self) -> Path:
        return self.root / self.split / "mask_dict.json"

    def _read_videos(self) -> list[Video]:
        top = Node(read_json(self.expressions_file), self.expressions_file)
        labelled = self.split != "valid"
        return self.keep(
            top["videos"].items(), lambda name, node: read_video(self, name, node, labelled)
        )


def read_video(corpus: Corpus, name: str, node: Node, labelled: bool) -> Video:
    """Read a video of MeViS or ReVOS, which share the format of expressions.

    Args:
        labelled: Refuse expressions without object ids.
    """
    name = Node(name, node.file, node.key).path_part()
    frames = corpus.read_frames(node["frames"])
    expressions = corpus.read_expressions(
        name, node["expressions"].items(), lambda i, e: _expression(i, e, labelled)
    )
    return Video(name, frames, expressions)


def _expression(name: str, node: Node, labelled: bool) -> Expression:
    text = node["exp"].of(str)
    type_id = node["type_id"].of(int) if "type_id" in node else None
    if not labelled and "obj_id" not in node and "anno_id" not in node:
        return Expression(name, text, (), (), type_id)
    objects, annos = node["obj_id"].identifiers(), node["anno_id"].identifiers()
    if len(objects) != len(annos):
        node.refuse(f"{len(objects)} obj_id but {len(annos)} anno_id")
    object_ids, anno_ids = pair_ids(objects, annos)
    return Expression(name, text, object_ids, anno_ids, type_id)
