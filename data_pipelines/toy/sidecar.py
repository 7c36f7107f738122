"""toy.json: what a toy corpus was made from, and what its clips show.

    {"format": 1, "layout", "preset", "seed", "split",
     "splits": {SPLIT: {"preset", "seed", "n_videos", "queries_per_video", "absent_share",
                        "multi_share", "summary"}},
     "videos": {VIDEO: {"split", "description", "objects": {OBJECT: {"name", "anno_id"}},
                        "order": [OBJECT], "expressions": {EXPRESSION: {"kind"}}}}}

`preset`, `seed` and `split` at the top are those of the first split, in the order of names.
`anno_id` is there where masks are run lengths. `traces/trace_files.py` reads the videos.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.corpora.metadata import Node, read_json
from data_pipelines.toy.clips import ClipSpec
from data_pipelines.toy.metadata import first_annos
from data_pipelines.toy.writers import Record
from rcot_rl.errors import InputError

SIDECAR = "toy.json"
FORMAT = 1


def read_sidecar(root: Path, layout: str | None = None) -> dict[str, Any] | None:
    """toy.json of `root`; None when there is none. Raises InputError for another layout's.

    layout: None takes any.
    """
    path = root / SIDECAR
    if not path.is_file():
        return None
    top = Node(read_json(path), path)
    if top["format"].of(int) != FORMAT:
        raise InputError(f"is not of format {FORMAT}", file=path, key="format")
    found = top["layout"].of(str)
    if layout not in (None, found):
        raise InputError(f"holds a toy corpus in the layout {found}, not {layout}", file=root)
    for _, split in top["splits"].items():
        for what in ("videos", "frames", "expressions", "objects"):
            split["summary"][what].of(int)
    for _, video in top["videos"].items():
        video["split"].of(str)
    return top.of(dict)


def summarise(root: Path | str) -> dict[str, Any]:
    """{"layout", "splits": {SPLIT: {"preset", "seed", "videos", "frames", "expressions",
    "objects", "kinds": {KIND: sentences}}}} of a toy corpus.

    Counts are those of `write_corpus`. Raises InputError where there is no toy corpus.
    """
    path = Path(root) / SIDECAR
    document = read_sidecar(Path(root))
    if document is None:
        raise InputError("no such file; is this a toy corpus?", file=path)
    top = Node(document, path)
    splits: dict[str, dict[str, Any]] = {}
    for name, split in top["splits"].items():
        kinds = Counter(
            expression["kind"].of(str)
            for _, video in top["videos"].items()
            if video["split"].of(str) == name
            for _, expression in video["expressions"].items()
        )
        splits[name] = {
            "preset": split["preset"].of(str),
            "seed": split["seed"].of(int),
            **split["summary"].of(dict),
            "kinds": dict(sorted(kinds.items())),
        }
    return {"layout": top["layout"].of(str), "splits": splits}


def merged(
    old: Mapping[str, Any] | None,
    spec: ClipSpec,
    made_from: Mapping[str, Any],
    records: Sequence[Record],
    hidden: Sequence[Record],
) -> dict[str, Any]:
    """toy.json with a split added; the same whichever split was written first.

    hidden: clips of Ref-YouTube-VOS' test file, written along with `valid`.
    """
    splits = {**(old["splits"] if old else {}), spec.split: dict(made_from)}
    videos = dict(old["videos"]) if old else {}
    annos = first_annos(spec.layout, spec.split, records)
    for split, group in ((spec.split, records), ("test", hidden)):
        for number, record in enumerate(group):
            first = annos[number] if annos else None
            entry = _video(record, split, first)
            if record.clip.name in videos:
                raise InputError(f"two clips are called {record.clip.name}", key="seed")
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
        # Within a split the order is that of the clips, since sorting is stable.
        "videos": dict(sorted(videos.items(), key=lambda item: item[1]["split"])),
    }


def _video(record: Record, split: str, first_anno: int | None) -> dict[str, Any]:
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
