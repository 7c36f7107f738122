"""Write a split's metadata files after its clips: expressions, objects, mask dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from data_pipelines.corpora.json_node import Node, read_json
from data_pipelines.toy.writers import (
    ClipRecord,
    SplitPaths,
    expression_folders,
    label_expressions,
    label_objects,
    reasonvos_video,
    rle_video,
    save_json,
)

ValidLabels = Literal["meta", "obj_id", "folders"]
"""How the masks of Ref-YouTube-VOS `valid` are assigned to expressions: by valid/meta.json, by
`obj_id` of the expressions, or by a folder of masks for each expression."""

_ANNOS_OF_A_SPLIT = 10_000_000
"""First annotation id of ReVOS' second split: the splits share mask_dict.json."""


@dataclass(frozen=True)
class SplitTarget:
    """A split being written into `temporary`, to be moved to `root`."""

    temporary: Path
    root: Path
    layout: str
    split: str
    valid_labels: ValidLabels = "meta"


Writer = Callable[[SplitTarget, Sequence[ClipRecord], Sequence[ClipRecord]], None]


def paths_of(layout: str, split: str) -> SplitPaths:
    """Return where the parts of a split lie."""
    if layout == "ref-youtube-vos" and split == "test":
        return SplitPaths("valid/JPEGImages")
    if layout in ("ref-youtube-vos", "davis17"):
        parts: tuple[str, ...] = (split, f"meta_expressions/{split}")
        if layout == "ref-youtube-vos" and split == "valid":
            parts += ("meta_expressions/test",)
        return SplitPaths(f"{split}/JPEGImages", f"{split}/Annotations", parts)
    if layout == "mevis":
        return SplitPaths(f"{split}/JPEGImages", parts=(split,))
    if layout == "revos":
        return SplitPaths("JPEGImages", parts=(f"meta_expressions_{split}_.json",))
    return SplitPaths("JPEGImages", "Annotations", ("meta_expressions.json",))


def first_annos(layout: str, split: str, records: Sequence[ClipRecord]) -> list[int]:
    """Return the annotation id of every clip's first object; empty for layouts without them."""
    if layout not in ("mevis", "revos") or (layout, split) == ("mevis", "valid"):
        return []
    start = _ANNOS_OF_A_SPLIT if (layout, split) == ("revos", "valid") else 0
    counts = [len(r.clip.scene.objects) for r in records]
    return list(accumulate(counts, initial=start))[:-1]


def _labels(
    split: SplitTarget, records: Sequence[ClipRecord], hidden: Sequence[ClipRecord]
) -> None:
    """Write the files of Ref-YouTube-VOS and Ref-DAVIS17.

    Validation expressions of Ref-YouTube-VOS name no object, unless `valid_labels` is "obj_id".
    """
    top = split.temporary
    named = split.layout == "davis17" or split.split == "train" or split.valid_labels == "obj_id"
    videos = {r.clip.name: label_expressions(r, named) for r in records}
    unseen = {r.clip.name: label_expressions(r, False) for r in hidden}
    path = top / "meta_expressions" / split.split / "meta_expressions.json"
    save_json(path, {"videos": {**videos, **unseen}})
    if hidden:
        save_json(top / "meta_expressions/test/meta_expressions.json", {"videos": unseen})
    by_meta = not named and split.valid_labels == "meta"
    objects = {r.clip.name: label_objects(r, by_meta) for r in records}
    if not named and split.valid_labels == "folders":
        for record in records:
            expression_folders(top / split.split / "Annotations", record)
    save_json(top / split.split / "meta.json", {"videos": objects})


def _mevis(split: SplitTarget, records: Sequence[ClipRecord], hidden: Sequence[ClipRecord]) -> None:
    annos = first_annos("mevis", split.split, records)
    folder = split.temporary / split.split
    if annos:
        pairs = zip(records, annos, strict=True)
        videos = {r.clip.name: rle_video(r, a, "mevis") for r, a in pairs}
        save_json(folder / "mask_dict.json", _mask_dict(records, annos))
    else:
        videos = {r.clip.name: label_expressions(r, False) for r in records}
    save_json(folder / "meta_expressions.json", {"videos": videos})


def _revos(split: SplitTarget, records: Sequence[ClipRecord], hidden: Sequence[ClipRecord]) -> None:
    """Write the files of ReVOS; its splits share the mask files, so existing masks are kept."""
    annos = first_annos("revos", split.split, records)
    pairs = zip(records, annos, strict=True)
    videos = {r.clip.name: rle_video(r, a, "revos") for r, a in pairs}
    save_json(split.temporary / f"meta_expressions_{split.split}_.json", {"videos": videos})
    masks = {**_existing(split.root / "mask_dict.json"), **_mask_dict(records, annos)}
    masks = dict(sorted(masks.items(), key=lambda item: int(item[0])))
    save_json(split.temporary / "mask_dict.json", masks)
    foreground = _existing(split.root / "mask_dict_foreground.json")
    for record in records:
        foreground[record.clip.name] = {
            "masks_rle": [rle for rle, _ in record.foreground],
            "foreground_ratio": [share for _, share in record.foreground],
        }
    save_json(split.temporary / "mask_dict_foreground.json", dict(sorted(foreground.items())))


def _reasonvos(
    split: SplitTarget, records: Sequence[ClipRecord], hidden: Sequence[ClipRecord]
) -> None:
    videos = {r.clip.name: reasonvos_video(r) for r in records}
    save_json(split.temporary / "meta_expressions.json", {"videos": videos})


def _mask_dict(records: Sequence[ClipRecord], annos: Sequence[int]) -> dict[str, Any]:
    return {
        str(first + i): list(rles)
        for record, first in zip(records, annos, strict=True)
        for i, rles in enumerate(record.rles)
    }


def _existing(path: Path) -> dict[str, Any]:
    return dict(Node(read_json(path), path).of(dict)) if path.is_file() else {}


WRITERS: Mapping[str, Writer] = {
    "ref-youtube-vos": _labels,
    "davis17": _labels,
    "mevis": _mevis,
    "revos": _revos,
    "reasonvos": _reasonvos,
}
"""Layout -> writer of (split, its clips, clips of Ref-YouTube-VOS' test file)."""
