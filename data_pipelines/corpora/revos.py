"""ReVOS in its published layout.

    ROOT/JPEGImages/<source>/…/<video>/<frame>.jpg
    ROOT/meta_expressions_train_.json, meta_expressions_valid_.json
    ROOT/mask_dict.json                              {annotation: [RLE | null per frame]}

Video names contain slashes. `type_id` is 0 (referring), 1 (reasoning) or 2 (no target, empty
lists). `mask_dict_foreground.json` is not read; only the robustness score needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from data_pipelines.corpora.corpus import Video
from data_pipelines.corpora.json_node import Node, read_json
from data_pipelines.corpora.mevis import read_video
from data_pipelines.corpora.rle_masks import RleMasks


class Revos(RleMasks):
    """Reader of ReVOS."""

    dataset: ClassVar[str] = "revos"
    splits: ClassVar[tuple[str, ...]] = ("train", "valid")

    @property
    def expressions_file(self) -> Path:
        return self.root / f"meta_expressions_{self.split}_.json"

    @property
    def frames_root(self) -> Path:
        return self.root / "JPEGImages"

    @property
    def masks_file(self) -> Path:
        return self.root / "mask_dict.json"

    def _read_videos(self) -> list[Video]:
        top = Node(read_json(self.expressions_file), self.expressions_file)
        return self.keep(
            top["videos"].items(), lambda name, node: read_video(self, name, node, labelled=True)
        )
