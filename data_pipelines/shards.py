"""Write shard sets atomically: parquet files, media, manifest and data card.

A set is built in `OUT/.<set>.partial` and renamed to `OUT/<set>`. After a kill, the parquet files
that were finished for the same plan are kept. The bytes depend on the plan alone, not on the number
of workers or on interruptions.
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
from data_pipelines.manifest import MANIFEST, VERSION, counts_of, ratios_of, write_json
from data_pipelines.parallel import Progress, ordered_map
from data_pipelines.planning.candidates import SPLITS, Split
from data_pipelines.planning.row_drawing import Instance
from data_pipelines.rows import RowMaker
from data_pipelines.tokens import token_statistics
from rcot_rl.errors import InputError
from rcot_rl.recipe.data_section import has_traces
from rcot_rl.system.files import replace_folder, sha256_of, visible

_ROWS_PER_GROUP = 64
_PARQUET: dict[str, Any] = {
    "compression": {"images.list.element.bytes": "none"},
    "use_dictionary": False,
}
"""Images are already compressed."""
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
    """Return the columns of a row.

    Embedded images are declared as such to `datasets`, which then returns PIL images, as verl's RL
    dataset expects; verl's SFT dataset reads the underlying dict.
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
    """Return a column's type as `datasets` writes it; importing `datasets` would take seconds."""
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": str(kind), "_type": "Value"}


@dataclass(frozen=True)
class SetSpec:
    """One set to write. `recipe`, `dropped` and `plan` go into its manifest unchanged."""

    name: str
    rows: Mapping[Split, Sequence[Instance]]
    recipe: Mapping[str, Any]
    recipe_hash: str
    dropped: Mapping[str, Any]
    plan: Sequence[Mapping[str, Any]]
    texts_digest: str
    rows_per_shard: int
    limits: Mapping[str, int] = field(default_factory=dict)
    """Maximum `prompt_tokens` and `total_tokens` of a row that training accepts."""
    traces: Mapping[str, Any] = field(default_factory=dict)
    """Traces requested and accepted, and refusals by cause."""
    rewards: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Stage that trains on the set -> name and sha256 of its reward. Rows do not depend on it."""
    corpora_digest: str = ""
    """Changes when expressions or masks of the corpora change."""

    def fingerprint(self) -> str:
        """Return a digest of all that the set's bytes depend on, except the frames' pixels."""
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


class RowsFailed(Exception):
    """Some rows cannot be made, because of defects that only decoding shows."""

    def __init__(self, faults: Sequence[tuple[Instance, CorpusFault]]) -> None:
        super().__init__(f"{len(faults)} rows could not be made")
        self.faults = faults


def write_set(
    spec: SetSpec, maker: RowMaker, out: Path, workers: int, progress: Progress
) -> dict[str, Any]:
    """Write `OUT/<set>` and return its manifest; a finished set of the same plan is kept.

    Raises:
        InputError: `OUT/<set>` is something else than a shard set.
        RowsFailed: Some rows cannot be made; raised after all rows were tried.
    """
    final, partial_dir = out / spec.name, out / f".{spec.name}.partial"
    fingerprint = spec.fingerprint()
    maker = replace(maker, beside=tuple(_sets_to_share(out, spec)))
    finished = _finished(final, fingerprint)
    if finished is not None:
        if finished.get("rewards") != spec.rewards:
            finished["rewards"] = dict(spec.rewards)
            write_json(final / MANIFEST, finished)
        return finished
    _open_partial(partial_dir, fingerprint)
    files: dict[str, str] = {}
    lengths: dict[str, list[Any]] = {split: [] for split in SPLITS}
    failed: list[tuple[Instance, CorpusFault]] = []
    done, total = 0, sum(len(rows) for rows in spec.rows.values())
    for split in SPLITS:
        for name, rows in _shards(spec, split):
            work = _ShardWork(spec, maker, partial_dir, final, workers, progress, (done, total))
            note = work.write(name, rows, failed)
            files |= note["files"]
            lengths[split] += note["lengths"]
            done += len(rows)
            progress(f"rows of shards {spec.name}", done, total)
    if failed:
        raise RowsFailed(failed)
    statistics = token_statistics(lengths, spec.limits, maker.counter)
    return _finish(spec, files, statistics, fingerprint, partial_dir, final)


def _sets_to_share(out: Path, spec: SetSpec) -> Iterator[tuple[Path, Mapping[str, str]]]:
    """Yield (folder, checksums) of the other sets of the same recipe: their images are equal."""
    for path in sorted(out.glob(f"*/{MANIFEST}")):
        try:
            manifest = json.loads(path.read_bytes())
            inputs = manifest["recipe"], manifest["corpora_sha256"], manifest["pixels"]
            same = inputs == (spec.recipe, spec.corpora_digest, PIXELS)
            files = manifest["files"]
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
        raise InputError(
            "exists and is not a shard set; remove it, or choose another output folder", file=final
        )
    try:
        manifest = json.loads((final / MANIFEST).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if not isinstance(manifest, dict) or manifest.get("fingerprint") != fingerprint:
        return None
    files = manifest["files"]
    # checksums are verified by `rcot data check`
    return manifest if all((final / name).is_file() for name in files) else None


def _open_partial(partial_dir: Path, fingerprint: str) -> None:
    """Open the build folder: continue an interrupted build of the same plan, or start a new one."""
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
    position: tuple[int, int]
    """Rows finished before this shard, and rows of the set."""

    def write(
        self,
        name: str,
        rows: Sequence[Instance],
        failed: list[tuple[Instance, CorpusFault]],
    ) -> dict[str, Any]:
        """Write one parquet file, unless an interrupted build has finished it.

        Args:
            failed: Receives the rows that cannot be made, with the reason.

        Returns:
            `files`: relative path -> sha256 of the parquet file and of its rows' media;
            `lengths`: token counts of every row.
        """
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
        outcomes = ordered_map(make, rows, self.workers)
        with pq.ParquetWriter(part, schema, **_PARQUET) as writer:
            for count, (instance, row) in enumerate(zip(rows, outcomes, strict=True), start=1):
                if isinstance(row, CorpusFault):
                    failed.append((instance, row))
                else:
                    files[row.media] = row.media_sha256
                    lengths.append(row.lengths)
                    group.append(row.columns)
                if group and (len(group) == _ROWS_PER_GROUP or count == len(rows)):
                    writer.write_table(pa.Table.from_pylist(group, schema=schema))
                    group.clear()
                    done, total = self.position
                    self.progress(f"rows of shards {self.spec.name}", done + count, total)
        if failed:
            part.unlink()
            return {"files": {}, "lengths": []}
        part.replace(self.folder / name)
        files[name] = sha256_of(self.folder / name)
        outcome = {"files": files, "lengths": lengths}
        write_json(note, outcome)
        return outcome


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
    replace_folder(partial_dir, final)
    return manifest


def _remove_strays(folder: Path, keep: set[str]) -> None:
    """Remove the files that an interrupted build left unfinished."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in keep:
            path.unlink()
