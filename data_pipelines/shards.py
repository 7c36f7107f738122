"""Shard sets on disk: parquet files, media, manifest and data card, whole or not at all.

A set is built in `OUT/.<set>.partial` and renamed to `OUT/<set>`. After a kill, parquet files that
were finished for the same plan are kept. Bytes depend on the plan alone, not on the number of
workers or on interruptions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.card import write_card
from data_pipelines.corpora import CorpusFault
from data_pipelines.geometry import PIXELS
from data_pipelines.manifest import MANIFEST, VERSION, counts_of, ratios_of, sha256_of, write_json
from data_pipelines.parallel import Progress, ordered_map
from data_pipelines.planning.row_drawing import SPLITS, Instance, Split
from data_pipelines.rows import RowMaker
from data_pipelines.tokens import tokens_of
from rcot_rl.errors import InputError
from rcot_rl.files import visible
from rcot_rl.recipe.data import has_traces

_ROWS_PER_GROUP = 64
_PARQUET: dict[str, Any] = {
    "compression": {"images.list.element.bytes": "none"},
    "use_dictionary": False,
}
"""Images are compressed already."""
_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_EXTRA_INFO = pa.struct(
    [
        ("index", pa.int64()),
        ("task", pa.string()),
        ("dataset", pa.string()),
        ("video", pa.string()),
        ("expression_id", pa.string()),
        ("expression", pa.string()),
        ("object_ids", pa.list_(pa.string())),
        ("frame", pa.string()),
        ("frame_index", pa.int64()),
        ("source_size", pa.list_(pa.int64())),
        ("canvas", pa.list_(pa.int64())),
        ("target", pa.string()),
        ("description", pa.string()),
        ("split", pa.string()),
        ("media", pa.string()),
        ("vision_tokens", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("total_tokens", pa.int64()),
    ]
)


def row_schema(traced: bool, embed: bool, clips: bool = False) -> pa.Schema:
    """Columns of a row. Embedded images are declared as such to `datasets`, which then gives PIL
    images: the form that verl's RL dataset was made for; its SFT dataset reads the dict beneath.
    """
    image = [("bytes", pa.binary()), ("path", pa.string())] if embed else [("image", pa.string())]
    fields = [
        ("data_source", pa.string()),
        ("prompt", _TURNS),
        ("images", pa.list_(pa.struct(image))),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", pa.struct([*_EXTRA_INFO, ("clip", pa.string())]) if clips else _EXTRA_INFO),
    ]
    if traced:
        fields.append(("messages", _TURNS))
    schema = pa.schema(fields)
    features = {field.name: _feature(field.type) for field in schema}
    if embed:
        features["images"] = {"feature": {"_type": "Image"}, "_type": "List"}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """A column's type as `datasets` writes it into parquet files; to import it takes seconds."""
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": str(kind), "_type": "Value"}


@dataclass(frozen=True)
class SetSpec:
    """One set to be written. `recipe` and `dropped` go into its manifest as they are."""

    name: str
    rows: Mapping[Split, Sequence[Instance]]
    recipe: Mapping[str, Any]
    recipe_hash: str
    dropped: Mapping[str, Any]
    plan: Sequence[Mapping[str, Any]]
    texts_digest: str
    rows_per_shard: int
    limits: Mapping[str, int] = field(default_factory=dict)
    """Most tokens of a row: `prompt_tokens`, `total_tokens`."""
    traces: Mapping[str, Any] = field(default_factory=dict)
    """How many traces were asked for and kept, and why others were not."""
    rewards: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Stage that trains on the set -> name and sha256 of its reward; no byte of a row depends on
    it."""
    corpora_digest: str = ""
    """Changes when sentences or masks of the corpora do."""

    def fingerprint(self) -> str:
        """Everything that the set's bytes depend on, short of the frames' pixels."""
        parts = {
            "version": VERSION,
            "pixels": PIXELS,
            "recipe": self.recipe,
            "recipe_hash": self.recipe_hash,
            "texts": self.texts_digest,
            "corpora": self.corpora_digest,
            "dropped": self.dropped,
            "limits": dict(self.limits),
            "plan": list(self.plan),
            "rows": {split: [vars(i) for i in rows] for split, rows in self.rows.items()},
        }
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class Spoiled(Exception):
    """Rows that could not be made, for defects that only decoding shows."""

    def __init__(self, faults: Sequence[tuple[Instance, CorpusFault]]) -> None:
        super().__init__(f"{len(faults)} rows could not be made")
        self.faults = faults


def write_set(
    spec: SetSpec, maker: RowMaker, out: Path, workers: int, progress: Progress
) -> dict[str, Any]:
    """Writes `OUT/<set>` and returns its manifest; a finished set of the same plan is left alone.

    Raises InputError when the folder holds something that is not a shard set, and Spoiled, after
    all rows were tried, when some cannot be made.
    """
    final, partial_dir = out / spec.name, out / f".{spec.name}.partial"
    fingerprint = spec.fingerprint()
    maker = replace(maker, beside=tuple(p for p in _others(out, spec)))
    finished = _finished(final, fingerprint)
    if finished is not None:
        if finished.get("rewards") != spec.rewards:
            finished["rewards"] = dict(spec.rewards)
            write_json(final / MANIFEST, finished)
        return finished
    _open_partial(partial_dir, fingerprint)
    files: dict[str, str] = {}
    lengths: dict[str, list[Any]] = {split: [] for split in SPLITS}
    spoiled: list[tuple[Instance, CorpusFault]] = []
    done, total = 0, sum(len(rows) for rows in spec.rows.values())
    for split in SPLITS:
        for name, rows in _shards(spec, split):
            work = _ShardWork(spec, maker, partial_dir, final, workers, progress, (done, total))
            note = work.write(name, rows, spoiled)
            files |= note["files"]
            lengths[split] += note["lengths"]
            done += len(rows)
            progress(f"shards {spec.name}", done, total)
    if spoiled:
        raise Spoiled(spoiled)
    figures = tokens_of(lengths, spec.limits, maker.counter)
    return _finish(spec, files, figures, fingerprint, partial_dir, final)


def _others(out: Path, spec: SetSpec) -> Iterator[tuple[Path, Mapping[str, str]]]:
    """Sets of the same recipe beside this one, which show frames as it does: folder, checksums."""
    for path in sorted(out.glob(f"*/{MANIFEST}")):
        try:
            manifest = json.loads(path.read_bytes())
            of = manifest["recipe"], manifest["corpora_sha256"], manifest["pixels"]
            same, files = of == (spec.recipe, spec.corpora_digest, PIXELS), manifest["files"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if same and path.parent.name != spec.name:
            yield path.parent, files


def _shards(spec: SetSpec, split: Split) -> list[tuple[str, Sequence[Instance]]]:
    rows = spec.rows.get(split, ())
    step = spec.rows_per_shard
    starts = range(0, len(rows), step)
    return [
        (f"{split}-{k:05d}-of-{len(starts):05d}.parquet", rows[start : start + step])
        for k, start in enumerate(starts)
    ]


def _finished(final: Path, fingerprint: str) -> dict[str, Any] | None:
    if not final.exists():
        return None
    if not (final / MANIFEST).is_file():
        if final.is_dir() and not visible(final.iterdir()):
            return None
        raise InputError("is in the way: not a shard set, so it will not be replaced", file=final)
    try:
        manifest = json.loads((final / MANIFEST).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(manifest, dict) or manifest.get("fingerprint") != fingerprint:
        return None
    files = manifest["files"]
    # Contents are the business of `rcot data check`.
    return manifest if all((final / name).is_file() for name in files) else None


def _open_partial(partial_dir: Path, fingerprint: str) -> None:
    """The build folder: as an interrupted build of the same plan left it, or new."""
    mark = partial_dir / ".state" / "fingerprint"
    if mark.is_file() and mark.read_text() == fingerprint:
        return
    shutil.rmtree(partial_dir, ignore_errors=True)
    mark.parent.mkdir(parents=True)
    mark.write_text(fingerprint)


@dataclass(frozen=True)
class _ShardWork:
    spec: SetSpec
    maker: RowMaker
    folder: Path
    final: Path
    workers: int
    progress: Progress
    at: tuple[int, int]
    """Rows done before this shard, of how many."""

    def write(
        self,
        name: str,
        rows: Sequence[Instance],
        spoiled: list[tuple[Instance, CorpusFault]],
    ) -> dict[str, Any]:
        """`files`: relative path -> sha256 of the parquet file and of the media that its rows name;
        `lengths`: tokens of every row. Rows that cannot be made are added to `spoiled`."""
        note = self.folder / ".state" / f"{name}.json"
        if note.is_file():
            return json.loads(note.read_bytes())
        files: dict[str, str] = {}
        lengths: list[Any] = []
        part = self.folder / f"{name}.part"
        group: list[dict[str, Any]] = []
        schema = row_schema(
            has_traces(self.spec.name), self.maker.embed, self.maker.clip_frames > 0
        )
        make = partial(self.maker.try_make, folder=self.folder, final=self.final)
        made = ordered_map(make, rows, self.workers)
        with pq.ParquetWriter(part, schema, **_PARQUET) as writer:
            for count, (instance, row) in enumerate(zip(rows, made, strict=True), start=1):
                if isinstance(row, CorpusFault):
                    spoiled.append((instance, row))
                else:
                    files[row.media] = row.media_sha256
                    lengths.append(row.lengths)
                    group.append(row.columns)
                if group and (len(group) == _ROWS_PER_GROUP or count == len(rows)):
                    writer.write_table(pa.Table.from_pylist(group, schema=schema))
                    group.clear()
                    self.progress(f"shards {self.spec.name}", self.at[0] + count, self.at[1])
        if spoiled:
            part.unlink()
            return {"files": {}, "lengths": []}
        part.replace(self.folder / name)
        files[name] = sha256_of(self.folder / name)
        found = {"files": files, "lengths": lengths}
        write_json(note, found)
        return found


def _finish(
    spec: SetSpec,
    files: dict[str, str],
    tokens: Mapping[str, Any] | None,
    fingerprint: str,
    partial_dir: Path,
    final: Path,
) -> dict[str, Any]:
    counts = {split: counts_of(spec.rows.get(split, ())) for split in SPLITS}
    manifest: dict[str, Any] = {
        "version": VERSION,
        "name": spec.name,
        "rows": {split: len(spec.rows.get(split, ())) for split in SPLITS},
        "counts": counts,
        "ratios": {split: ratios_of(counts[split]) for split in SPLITS},
        "plan": list(spec.plan),
        "dropped": spec.dropped,
        "tokens": tokens,
        "traces": dict(spec.traces),
        "recipe": spec.recipe,
        "recipe_hash": spec.recipe_hash,
        "corpora_sha256": spec.corpora_digest,
        "pixels": PIXELS,
        "rewards": dict(spec.rewards),
        "fingerprint": fingerprint,
    }
    for path in write_card(partial_dir, manifest):
        files[path.relative_to(partial_dir).as_posix()] = sha256_of(path)
    manifest["files"] = dict(sorted(files.items()))
    write_json(partial_dir / MANIFEST, manifest)
    shutil.rmtree(partial_dir / ".state")
    _remove_strays(partial_dir, set(files) | {MANIFEST})
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial_dir.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return manifest


def _remove_strays(folder: Path, keep: set[str]) -> None:
    """What an interrupted build left half-written."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in keep:
            path.unlink()
