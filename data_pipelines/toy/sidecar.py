"""toy.json: the arguments that a toy corpus was made from, and the contents of its clips.

    {"format": 1, "layout", "preset", "seed", "split",
     "splits": {SPLIT: {"preset", "seed", "n_videos", "queries_per_video", "absent_share",
                        "multi_share", "summary"}},
     "videos": {VIDEO: {"split", "description", "objects": {OBJECT: {"name", "anno_id"}},
                        "order": [OBJECT], "expressions": {EXPRESSION: {"kind"}}}}}

`preset`, `seed` and `split` at the top are those of the first split, in the order of names.
`anno_id` is there where masks are run lengths. `traces/toy_templates.py` reads the videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.corpora.json_node import Node, read_json
from data_pipelines.toy.clips import ClipSpec
from data_pipelines.toy.split_files import first_annos
from data_pipelines.toy.writers import ClipRecord
from rcot_rl.errors import InputError

SIDECAR = "toy.json"
FORMAT = 1


def read_sidecar(root: Path, layout: str | None = None) -> dict[str, Any] | None:
    """Return toy.json of `root`, None without one; InputError for another layout (None: any)."""
    path = root / SIDECAR
    if not path.is_file():
        return None
    top = Node(read_json(path), path)
    if top["format"].of(int) != FORMAT:
        raise InputError(f"must be {FORMAT}", file=path, key="format")
    stored = top["layout"].of(str)
    if layout not in (None, stored):
        raise InputError(f"is a toy corpus in the layout {stored}, not {layout}", file=root)
    for _, split in top["splits"].items():
        for count in ("videos", "frames", "expressions", "objects"):
            split["summary"][count].of(int)
    for _, video in top["videos"].items():
        video["split"].of(str)
    return top.of(dict)


def merged(
    old: Mapping[str, Any] | None,
    spec: ClipSpec,
    made_from: Mapping[str, Any],
    records: Sequence[ClipRecord],
    hidden: Sequence[ClipRecord],
) -> dict[str, Any]:
    """Return toy.json with a split added; the order in which splits are written does not matter.

    Args:
        old: The existing toy.json, if any.
        made_from: Arguments of the split.
        hidden: Clips of Ref-YouTube-VOS' test file, written along with `valid`.
    """
    splits = {**(old["splits"] if old else {}), spec.split: dict(made_from)}
    videos = dict(old["videos"]) if old else {}
    annos = first_annos(spec.layout, spec.split, records)
    for split, group in ((spec.split, records), ("test", hidden)):
        for number, record in enumerate(group):
            first = annos[number] if annos else None
            entry = _video(record, split, first)
            if record.clip.name in videos:
                raise InputError(f"two clips have the name {record.clip.name}", key="seed")
            videos[record.clip.name] = entry
    splits = dict(sorted(splits.items()))
    first_split = next(iter(splits))
    return {
        "format": FORMAT,
        "layout": spec.layout,
        "preset": splits[first_split]["preset"],
        "seed": splits[first_split]["seed"],
        "split": first_split,
        "splits": splits,
        # sorting is stable: within a split the clips keep their order
        "videos": dict(sorted(videos.items(), key=lambda item: item[1]["split"])),
    }


def _video(record: ClipRecord, split: str, first_anno: int | None) -> dict[str, Any]:
    scene = record.clip.scene
    objects: dict[str, dict[str, Any]] = {}
    for i, item in enumerate(scene.objects):
        objects[str(i + 1)] = {"name": item.name}
        if first_anno is not None:
            objects[str(i + 1)]["anno_id"] = first_anno + i
    return {
        "split": split,
        "description": scene.describe(),
        "objects": objects,
        "order": [str(i + 1) for i in scene.order],
        "expressions": {name: {"kind": q.kind} for name, q in record.clip.expressions},
    }
