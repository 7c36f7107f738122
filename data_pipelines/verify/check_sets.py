"""Check that shard sets match their manifests and are fit to train on (`rcot data check`).

Verifies checksums, unlisted files, the schema, every row (`check_rows.py`), counts and ratios, and
that sets side by side share no instance and no validation video. Lists every fault. Does not
recompute rows from the corpora.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from data_pipelines.manifest import (
    MANIFEST,
    VERSION,
    manifest_fault,
    ratios_of,
    tally,
)
from data_pipelines.planning.row_drawing import divide
from data_pipelines.shards import row_schema
from data_pipelines.verify.check_rows import (
    UNREADABLE,
    RowKey,
    check_row,
    is_file,
    row_key,
    row_kind,
)
from rcot_rl.errors import InputError
from rcot_rl.recipe.data_section import has_traces
from rcot_rl.system.files import sha256_of, visible

_SPLITS = ("train", "val")


@dataclass(frozen=True)
class ShardFault:
    """One fault and its place."""

    file: str
    row: int | None
    """Row in the file, from 0; None if the fault is the file's."""
    key: str
    message: str

    def __str__(self) -> str:
        row = "" if self.row is None else f":{self.row}"
        return ": ".join(p for p in (f"{self.file}{row}", self.key, self.message) if p)


@dataclass
class ShardReport:
    """Result of `check`: counts and ratios by set and split, and all faults."""

    counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    ratios: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    faults: list[ShardFault] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if there are no faults."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, for `--json`."""
        return {
            "ok": self.ok,
            "counts": self.counts,
            "ratios": self.ratios,
            "faults": [vars(f) for f in self.faults],
        }


@dataclass
class _Contents:
    """What the comparison with other sets needs to know of one set."""

    folder: Path
    instances: dict[RowKey, str] = field(default_factory=dict)
    """Instance -> its file and row."""
    videos: dict[str, set[tuple[str, str]]] = field(
        default_factory=lambda: {split: set() for split in _SPLITS}
    )


def check(folder: Path | str, model: Path | None = None) -> ShardReport:
    """Check one shard set, or every set in a folder of sets.

    A single set is also compared with the sets beside it. Raises InputError.

    Args:
        model: A policy's folder. Its processor then reads some rows of every kind
            (`processor.py`), and rows must not contain control tokens of its tokenizer.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise InputError("no such folder", file=folder)
    single = (folder / MANIFEST).is_file()
    beside = _sets_in(folder.parent) if single else _sets_in(folder)
    chosen = [folder] if single else beside
    if not chosen:
        raise InputError(f"contains no shard set (no {MANIFEST})", file=folder)
    report = ShardReport()
    if not single:
        report.faults += [
            ShardFault(
                str(p / MANIFEST), None, "", "missing: the shards beside it cannot be checked"
            )
            for p in _without_manifest(folder)
        ]
    processor = None
    if model is not None:
        from data_pipelines.verify.processor import PolicyProcessor

        processor = PolicyProcessor(model)
    extra_control = () if processor is None else processor.extra_control
    contents = [_SetCheck(path, report, extra_control).run() for path in chosen]
    if single:
        silent = ShardReport()
        contents += [_SetCheck(p, silent).read_keys() for p in beside if p != folder]
    _compare(contents, report)
    if processor is not None:
        for path in chosen:
            for shard in visible(path.glob("*.parquet")):
                for row, key, message in processor.faults(shard):
                    report.faults.append(ShardFault(str(shard), row, key, message))
    return report


def _sets_in(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if not p.name.startswith(".") and (p / MANIFEST).is_file()
    )


def _without_manifest(folder: Path) -> list[Path]:
    """Return the folders of shards that have no manifest."""
    return sorted(
        p
        for p in folder.iterdir()
        if not p.name.startswith(".")
        and not (p / MANIFEST).exists()
        and visible(p.glob("*.parquet"))
    )


def _compare(contents: list[_Contents], report: ShardReport) -> None:
    for i, first in enumerate(contents):
        for second in contents[i + 1 :]:
            for key in sorted(first.instances.keys() & second.instances.keys()):
                report.faults.append(
                    ShardFault(
                        first.instances[key],
                        None,
                        "/".join(map(str, key)),
                        f"this instance is also in {second.instances[key]}",
                    )
                )
        for other in contents:
            for dataset, video in sorted(first.videos["val"] & other.videos["train"]):
                message = f"a validation video of {first.folder.name}, it also trains"
                report.faults.append(
                    ShardFault(str(other.folder), None, f"{dataset}/{video}", message)
                )


class _SetCheck:
    def __init__(
        self, folder: Path, report: ShardReport, extra_control: tuple[str, ...] = ()
    ) -> None:
        self.folder, self.report, self.extra_control = folder, report, extra_control
        self.contents = _Contents(folder)
        self.kinds: dict[str, list[tuple[str, str, str, str]]] = {s: [] for s in _SPLITS}
        self.named_media: set[str] = set()

    def run(self) -> _Contents:
        manifest = self._manifest()
        if manifest is None:
            return self.contents
        self._files(manifest["files"])
        for name, split in self._parquet_names():
            self._parquet(name, split, manifest)
        self._statistics(manifest)
        for name in manifest["files"]:
            if name.startswith("media/") and name not in self.named_media:
                self._fault(name, "no row uses this image")
        return self.contents

    def read_keys(self) -> _Contents:
        """Read only what the comparison with other sets needs; skip unreadable files."""
        for name, split in self._parquet_names():
            try:
                for number, row in _rows(self.folder / name, ["extra_info"]):
                    self._remember(row, name, number, split)
            except UNREADABLE:
                continue
        return self.contents

    def _fault(self, name: str, message: str, row: int | None = None, key: str = "") -> None:
        self.report.faults.append(ShardFault(str(self.folder / name), row, key, message))

    def _manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads((self.folder / MANIFEST).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            self._fault(MANIFEST, f"not valid JSON: {error}")
            return None
        fault = manifest_fault(manifest)
        if fault is not None:
            self._fault(MANIFEST, fault[1], key=fault[0])
            return None
        if manifest["version"] != VERSION:
            self._fault(MANIFEST, f"version {manifest['version']}, not {VERSION}", key="version")
            return None
        return manifest

    def _files(self, files: Mapping[str, Any]) -> None:
        for name, digest in files.items():
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts:
                self._fault(MANIFEST, "a name that points outside the set", key=f"files.{name}")
            elif not is_file(self.folder / name):
                self._fault(name, "missing")
            else:
                self._checksum(name, digest)
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if name.startswith(".") or "/." in name:
                continue
            if path.is_file() and name != MANIFEST and name not in files:
                self._fault(name, "not in the manifest")

    def _checksum(self, name: str, digest: str) -> None:
        try:
            if sha256_of(self.folder / name) != digest:
                self._fault(name, "checksum differs from the manifest's")
        except OSError as error:
            self._fault(name, f"cannot be read: {error.strerror}")

    def _parquet_names(self) -> list[tuple[str, str]]:
        return [(p.name, s) for s in _SPLITS for p in sorted(self.folder.glob(f"{s}-*.parquet"))]

    def _parquet(self, name: str, split: str, manifest: Mapping[str, Any]) -> None:
        path = self.folder / name
        data = manifest["recipe"].get("data", {})
        embed = data.get("media", "embedded") == "embedded"
        clips = data.get("clip_frames", 0) > 0
        expected = row_schema(has_traces(manifest["name"]), embed, clips)
        try:
            schema = pq.read_schema(path)
            if not schema.equals(expected):
                self._fault(name, "columns differ from the row schema", key="schema")
                return
            for number, row in _rows(path):
                for key, message in check_row(
                    row, self.folder, split, manifest, self.extra_control
                ):
                    self._fault(name, message, number, key)
                self._remember(row, name, number, split)
        except UNREADABLE as error:
            self._fault(name, f"cannot be read: {error}")

    def _remember(self, row: Mapping[str, Any], name: str, number: int, split: str) -> None:
        info = row["extra_info"] or {}
        place = f"{self.folder / name}:{number}"
        self.contents.instances.setdefault(row_key(info), place)
        self.contents.videos[split].add((str(info.get("dataset")), str(info.get("video"))))
        if "reward_model" in row:
            self.kinds[split].append(row_kind(row))
            self.named_media.add(str(info.get("media")))
            at = len(self.kinds[split]) - 1
            if info.get("index") != at:
                self._fault(name, f"is {info.get('index')}, not {at}", number, "extra_info.index")

    def _statistics(self, manifest: Mapping[str, Any]) -> None:
        name = manifest["name"]
        counts = {split: tally(self.kinds[split]) for split in _SPLITS}
        ratios = {split: ratios_of(counts[split]) for split in _SPLITS}
        self.report.counts[name], self.report.ratios[name] = counts, ratios
        for split in _SPLITS:
            rows = len(self.kinds[split])
            if manifest["rows"].get(split) != rows:
                listed = manifest["rows"].get(split)
                self._fault(MANIFEST, f"is {listed}, but there are {rows}", key=f"rows.{split}")
            if manifest["counts"].get(split) != counts[split]:
                self._fault(MANIFEST, "differs from the rows", key=f"counts.{split}")
            if manifest["ratios"].get(split) != ratios[split]:
                self._fault(MANIFEST, "differs from the rows", key=f"ratios.{split}")
            self._recipe(split, counts[split], manifest["recipe"].get("data", {}))
            self._repeated(split)

    def _recipe(self, split: str, counts: Mapping[str, int], data: Mapping[str, Any]) -> None:
        """Check the sizes and ratios that the recipe asks for."""
        sizes = data.get("sets", {}).get(self.folder.name)
        if not isinstance(sizes, Mapping):
            return
        for task in ("aks", "ktg"):
            want = sizes[task] if split == "train" else (sizes["val"] if sizes[task] else 0)
            have = counts.get(task, 0)
            if have != want and not (data.get("allow_smaller") and have < want):
                self._fault(MANIFEST, f"{have} {task} rows, asked for {want}", key=f"rows.{split}")
        pairs = [("aks", "A", "B", data.get("a_to_b"), counts.get("aks", 0))]
        grounded = counts.get("ktg", 0) - counts.get("ktg/none", 0)
        pairs.append(("ktg", "single", "multi", data.get("single_multi"), grounded))
        for task, first, second, ratio, total in pairs:
            if ratio is None:
                continue
            parts = (counts.get(f"{task}/{first}", 0), counts.get(f"{task}/{second}", 0))
            if parts != divide(total, ratio):
                message = f"{first}:{second} is {parts[0]}:{parts[1]}, asked for {ratio}:1"
                self._fault(MANIFEST, message, key=f"ratios.{split}")

    def _repeated(self, split: str) -> None:
        seen: set[tuple[str, RowKey]] = set()
        for name, of in self._parquet_names():
            if of != split:
                continue
            try:
                for number, row in _rows(self.folder / name, ["extra_info"]):
                    info = row["extra_info"] or {}
                    key = (str(info.get("task")), row_key(info))
                    if key in seen:
                        self._fault(name, "this instance is repeated", number, "extra_info")
                    seen.add(key)
            except UNREADABLE:
                continue


def _rows(path: Path, columns: list[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) of a parquet file, a few rows in memory at a time."""
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=16, columns=columns):
            for row in batch.to_pylist():
                yield number, row
                number += 1
