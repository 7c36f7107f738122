"""The preflight's checks of shard sets that are built: complete, and made for this recipe?

Checksums are compared for as many parquet files as fit into `BUDGET_BYTES` (a fraction of a
second). Of the others only the footers are read, and the finding refers to `rcot data check`. Token
counts are the exact ones of the manifests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.preflight.checks.case import MANIFEST, RunCase
from cluster.preflight.checks.findings import Notes
from cluster.preflight.checks.rewards import rows_of, tasks_of
from rcot_rl.recipe.training_section import BASE
from rcot_rl.suggestions import did_you_mean
from rcot_rl.system.files import sha256_of, visible

BUDGET_BYTES = 96 * 2**20
"""Size of the parquet files whose checksums are compared, over all sets."""

_LATER = "a stage that fails when its turn comes, or learns from other rows than it seems"
_NOT_CONTENT = {
    "workers",
    "store",
    "rows_per_shard",
    "corpora",
    "describe",
    "trace",
    "describer",
    "tracer",
    "response",
}
"""Keys of the data section on which no row depends, whose paths may differ, or with own checks."""


_SFT_COLUMNS = ("messages", "images")
_GRPO_COLUMNS = ("data_source", "prompt", "images", "reward_model", "extra_info")


@dataclass(frozen=True)
class _Set:
    """A shard set, and a stage that trains on it."""

    stage: str
    key: str
    folder: Path
    manifest: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / MANIFEST


def _rebuild(folder: Path) -> str:
    """Return the fix that builds a shard set again."""
    return f"remove {folder} and build it again (`rcot data build RECIPE --out {folder.parent}`)"


def shards(case: RunCase, notes: Notes) -> None:
    """Check the sets of the training stages to be run, unless the data stage will build them."""
    if "data" in case.todo:
        return
    budget, opened, seen = BUDGET_BYTES, dict[str, _Set | None](), set()
    for stage in case.training:
        for source in filter(None, (stage, case.recipe.rehearsed_by(stage))):
            if source not in opened:
                shard_set = opened[source] = _open(case, notes, source)
                if shard_set is None:
                    continue
                if shard_set.folder not in seen:
                    budget = _files(notes, shard_set, budget)
                    seen.add(shard_set.folder)
                _recipe(case, notes, shard_set)
                _rows(case, notes, shard_set)
            rows = opened[source]
            if rows is not None:
                _lengths(case, notes, replace(rows, stage=stage))


def _open(case: RunCase, notes: Notes, stage: str) -> _Set | None:
    """Return the set that a stage trains on; None, with a finding, if it has no valid manifest."""
    name, key = case.recipe.stage(stage).shard_set, f"train.{stage}.shard_set"
    folder = case.shards(name)
    if not (folder / MANIFEST).is_file():
        built = [path.parent.name for path in folder.parent.glob(f"*/{MANIFEST}")]
        notes.error(
            f"{stage}.shards",
            f"{folder}: is no shard set (no manifest.json){did_you_mean(name, built)}",
            cost=_LATER,
            fix=f"add data to stages, or correct {key}",
        )
        return None
    manifest = case.manifest(name)
    sections = ("files", "rows", "recipe", "counts")
    if not isinstance(manifest, dict) or not all(
        isinstance(manifest.get(section), dict) for section in sections
    ):
        notes.error(
            f"{stage}.shards",
            f"{folder / MANIFEST}: is no manifest of a shard set",
            cost=_LATER,
            fix=_rebuild(folder),
        )
        return None
    return _Set(stage, key, folder, manifest)


def _files(notes: Notes, s: _Set, budget: int) -> int:
    """Check files and checksums against the manifest; return the rest of `budget`, in bytes."""
    files = s.manifest["files"]
    missing = [name for name in files if not _inside(s.folder, name)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        notes.error(
            f"{s.stage}.files",
            f"{s.folder / missing[0]}: named by the manifest, but missing{more}",
            cost=_LATER,
            fix="copy the whole folder again, or " + _rebuild(s.folder),
        )
    unchecked = 0
    for path in visible(s.folder.glob("*.parquet")):
        if path.name not in files:
            notes.error(
                f"{s.stage}.files",
                f"{path}: not named by the manifest, and would be read",
                cost=_LATER,
                fix="remove it",
            )
            continue
        size = path.stat().st_size
        if size > budget:
            unchecked += 1
            continue
        budget -= size
        if sha256_of(path) != files[path.name]:
            notes.error(
                f"{s.stage}.checksum",
                f"{path}: its sha256 is not the manifest's",
                cost=_LATER,
                fix="copy the file again, or " + _rebuild(s.folder),
            )
    if unchecked:
        notes.unknown(
            f"{s.stage}.checksum",
            f"{s.folder}: checksums of {unchecked} large parquet files were not compared",
            cost=_LATER,
            fix=f"rcot data check {s.folder.parent}",
        )
    return budget


def _inside(folder: Path, name: str) -> bool:
    path = folder / name
    return ".." not in Path(name).parts and not Path(name).is_absolute() and path.is_file()


def _recipe(case: RunCase, notes: Notes, s: _Set) -> None:
    """Check the canvas, prompts and data section that the rows were made with."""
    before, now = s.manifest["recipe"], case.recipe
    canvas = now.canvas.image
    if before.get("canvas") != canvas:
        notes.error(
            f"{s.stage}.canvas",
            f"{s.path}: rows were made for a canvas of {before.get('canvas')} pixels, and "
            f"canvas.image={canvas}",
            cost="boxes in other coordinates than the rewards': days, and no error",
            fix=_rebuild(s.folder),
        )
    if before.get("prompts") != Path(now.prompts).stem:
        notes.error(
            f"{s.stage}.prompts",
            f"{s.path}: rows hold prompts {before.get('prompts')!r}, and prompts={now.prompts}",
            cost="a policy that is asked with other prompts than it was trained with",
            fix=_rebuild(s.folder),
        )
    current = now.data.model_dump(mode="json")
    recorded = before.get("data") if isinstance(before.get("data"), dict) else {}
    form = recorded.get("response", "think_answer")
    if form != now.data.response:
        notes.error(
            f"{s.stage}.response",
            f"{s.path}: rows were made with data.response={form}, and the recipe has "
            f"data.response={now.data.response}",
            cost="a policy that is asked with other prompts than it was trained with",
            fix=_rebuild(s.folder),
        )
    # keys that the schema no longer has are not compared
    shared = recorded.keys() & current.keys() - _NOT_CONTENT
    differs = [key for key in shared if not _same(key, recorded[key], current[key], s.folder.name)]
    if differs:
        notes.warning(
            f"{s.stage}.recipe",
            f"{s.path}: rows were made with another recipe "
            f"(data.{', data.'.join(sorted(differs))})",
            cost="a result that its recipe does not explain",
            fix=_rebuild(s.folder),
        )


def _same(key: str, before: Any, now: Any, name: str) -> bool:
    """Return True if a key of the data section means the same rows in the set called `name`."""
    if before is None or now is None:
        return True
    if key == "sets":  # the recipe may have gained or lost other sets
        return isinstance(before, dict) and name in now and before.get(name) == now[name]
    if isinstance(before, dict) and isinstance(now, dict):  # a section may have new keys
        return all(now[k] == v for k, v in before.items() if k in now)
    return bool(before == now)


def _rows(case: RunCase, notes: Notes, s: _Set) -> None:
    """Check columns and number of rows, from the parquet files' footers, and their tasks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    counted = {"train": 0, "val": 0}
    taught = s.stage in case.recipe.sft_stages
    columns = _SFT_COLUMNS if taught else _GRPO_COLUMNS
    for path in visible(s.folder.glob("*.parquet")):
        try:
            footer = pq.ParquetFile(path)
        except (OSError, pa.ArrowException):
            notes.error(
                f"{s.stage}.parquet",
                f"{path}: is not a readable parquet file",
                cost=_LATER,
                fix="copy the file again, or " + _rebuild(s.folder),
            )
            return
        absent = [c for c in columns if c not in footer.schema_arrow.names]
        if absent:
            notes.error(
                f"{s.stage}.columns",
                f"{path}: lacks the column {absent[0]}, which verl reads",
                cost=_LATER,
                fix="name a set made for this stage in " + s.key,
            )
            return
        split = path.name.partition("-")[0]
        counted[split] = counted.get(split, 0) + footer.metadata.num_rows
    for split, rows in s.manifest["rows"].items():
        if counted.get(split, 0) != rows:
            notes.error(
                f"{s.stage}.row_count",
                f"{s.path}: says {rows} rows of {split}, and the parquet files have "
                f"{counted.get(split, 0)}",
                cost=_LATER,
                fix=_rebuild(s.folder),
            )
            return
    if not taught:
        _task(case, notes, s, counted)
        return
    settings, key = case.recipe.sft(s.stage), f"train.{s.stage}.batch_size"
    size, rows = settings.batch_size, counted["train"]
    if settings.tasks is not None:
        of_task = s.manifest["counts"].get("train") or {}
        rows = sum(of_task.get(task, 0) for task in settings.tasks)
    if rows < size:
        notes.error(
            f"{s.stage}.batch",
            f"{s.folder}: {rows} rows make no batch of {key}={size}",
            cost="a stage without a step",
            fix=f"lower {key}",
        )


def _task(case: RunCase, notes: Notes, s: _Set, rows: Mapping[str, int]) -> None:
    """Check the rows of a GRPO stage against its reward and its batches; rows: split -> number."""
    g, tasks = case.recipe.grpo(s.stage), tasks_of(case, s.stage)
    counts, task = s.manifest["counts"].get("train") or {}, " or ".join(tasks)
    of_task = sum(counts.get(t, 0) for t in tasks)
    # a reward of none of the rows is `<stage>.reward_task`
    if of_task < rows["train"] and set(tasks) & set(rows_of(case, s.stage)):
        notes.error(
            f"{s.stage}.task",
            f"{s.path}: {of_task} of {rows['train']} rows ask {task}, which the reward of "
            f"{s.stage} scores",
            cost="an error, or rewards of 0, at other rows",
            fix=f"name a set of only {task} rows in {s.key}",
        )
    if rows["train"] < g.prompts_per_step:
        notes.error(
            f"{s.stage}.rows",
            f"{s.folder}: {rows['train']} rows make no step of prompts_per_step="
            f"{g.prompts_per_step} prompts",
            cost="a stage without a step",
            fix=f"lower train.{s.stage}.prompts_per_step",
        )
    if not rows["val"]:
        notes.error(
            f"{s.stage}.val",
            f"{s.folder}: has no val shard, and verl opens one",
            cost=_LATER,
            fix=f"set data.sets.{s.folder.name}.val, and build again",
        )


def _lengths(case: RunCase, notes: Notes, s: _Set) -> None:
    """Check the token counts of the rows against the stage's limits."""
    tokens = s.manifest.get("tokens")
    train = ((tokens or {}).get("splits") or {}).get("train")
    if not train:
        notes.unknown(
            f"{s.stage}.lengths",
            f"{s.path}: rows' tokens were not counted (the policy was not there when they were "
            "made)",
            cost="an error at the first long prompt",
            fix=f"rcot data check {s.folder.parent} --model FOLDER",
        )
        return
    if s.stage in case.recipe.sft_stages:
        limit = case.recipe.sft(s.stage).max_length
        _over(notes, s, "total", train, f"train.{s.stage}.max_length", limit)
        _responses(case, notes, s)
    else:
        key, g = f"train.{s.stage}", case.recipe.grpo(s.stage)
        _over(notes, s, "prompt", train, f"{key}.max_prompt_length", g.max_prompt_length)


def _over(notes: Notes, s: _Set, part: str, train: Any, key: str, limit: int) -> None:
    most = train[f"{part}_tokens"]["most"]
    if most > limit:
        notes.error(
            f"{s.stage}.lengths",
            f"{s.path}: the longest row has {most} {part} tokens, and {key}={limit}",
            cost="an error when verl reaches that row",
            fix=f"{key}={most}",
        )


def _responses(case: RunCase, notes: Notes, s: _Set) -> None:
    """Check that the longest response that SFT teaches fits into GRPO's response length."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    longest = 0
    columns = ["extra_info.prompt_tokens", "extra_info.total_tokens"]
    try:
        for path in sorted(s.folder.glob("train-*.parquet")):
            table = pq.ParquetFile(path).read(columns=columns)
            if "extra_info" not in table.column_names:
                return  # rows of another kind: the manifest's counts do not describe this file
            for info in table.column("extra_info").to_pylist():
                total, prompt = info.get("total_tokens"), info.get("prompt_tokens")
                if total is not None and prompt is not None:
                    longest = max(longest, total - prompt)
    except (OSError, pa.ArrowException):
        return  # `_rows` reports the file
    for stage in case.grpo:
        g, key = case.recipe.grpo(stage), f"train.{stage}"
        if longest > g.max_response_length and s.stage in _ancestors(case, stage):
            notes.error(
                f"{stage}.response_tokens",
                f"{key}.max_response_length={g.max_response_length}: SFT's traces in {s.folder} "
                f"have up to {longest} tokens",
                cost="responses cut before their answer: rewards of 0 for what SFT taught",
                fix=f"{key}.max_response_length={longest + 64}",
            )


def _ancestors(case: RunCase, stage: str) -> Iterator[str]:
    """Yield the training stages whose weights a stage's policy goes back to."""
    while (stage := case.recipe.start_of(stage)) != BASE:
        yield stage
