"""ReVOS in its published layout.

    ROOT/JPEGImages/<source>/…/<video>/<frame>.jpg
    ROOT/meta_expressions_train_.json, meta_expressions_valid_.json
    ROOT/mask_dict.json                              {annotation: [RLE | null per frame]}
    ROOT/mask_dict_foreground.json                   {video: {"masks_rle": [RLE per frame]}}

Video names contain slashes. `type_id` is 0 (referring), 1 (reasoning) or 2 (no target, empty
lists). The foreground is the union of all objects of a video. Only the robustness score reads it,
so the file may be missing.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_pipelines.corpora import rle
from data_pipelines.corpora.corpus import CorpusFault, Video
from data_pipelines.corpora.json_node import Node, read_json
from data_pipelines.corpora.mask_file import MaskFile
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

    @property
    def foreground_file(self) -> Path:
        """Path of mask_dict_foreground.json."""
        return self.root / "mask_dict_foreground.json"

    @cached_property
    def foreground(self) -> MaskFile | None:
        """The index of the foreground file; None if it is missing. Raises InputError."""
        return MaskFile(self.foreground_file) if self.foreground_file.is_file() else None

    def foreground_mask(self, video: Video, frame_index: int) -> np.ndarray:
        """Return the number of foreground masks on each pixel, uint8 [H, W]. Raises CorpusFault.

        A frame has one mask, the union of the objects. A list of masks is added up, as in VISA's
        evaluation.
        """
        entry = None if self.foreground is None else self.foreground.get(video.id)
        place = f"{self.foreground_file} {video.id}"
        masks = entry.get("masks_rle") if isinstance(entry, dict) else None
        if not isinstance(masks, list):
            raise CorpusFault("no_foreground", place, "no list masks_rle of this video")
        if frame_index >= len(masks):
            detail = f"{len(masks)} masks, {len(video.frames)} frames"
            raise CorpusFault("mask_count", place, detail)
        listed = masks[frame_index]
        try:
            layers = [rle.decode(r) for r in (listed if isinstance(listed, list) else [listed])]
            # raises ValueError for an empty list and for unequal sizes
            return np.stack(layers).sum(axis=0, dtype=np.uint8)
        except ValueError as error:
            raise CorpusFault("bad_rle", f"{place}[{frame_index}]", str(error)) from error

    def _read_videos(self) -> list[Video]:
        top = Node(read_json(self.expressions_file), self.expressions_file)
        return self.keep(
            top["videos"].items(), lambda name, node: read_video(self, name, node, labelled=True)
        )
