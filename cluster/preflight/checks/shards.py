"""The preflight's checks of shard sets that a run finds built: are they whole, and this recipe's?

Checksums are compared for as many parquet files as fit into `BUDGET_BYTES` (a fraction of a
second); for the others the footers are read, and it is said that `rcot data check` does the rest.
Lengths are the exact ones that were counted when the rows were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.preflight.checks.case import GRPO, Case
from cluster.preflight.checks.findings import Notes
from cluster.preflight.checks.rewards import tasks_of
from rcot_rl.files import visible
from rcot_rl.recipe.schema import section_key
from rcot_rl.suggestions import did_you_mean

MANIFEST = "manifest.json"
"""data_pipelines/manifest.py, whose import takes half a second."""

BUDGET_BYTES = 96 * 2**20
"""Of parquet files whose checksums are compared, of all sets together."""

_LATER = "a stage that fails when its turn comes, or learns from other rows than it seems"
_NOT_CONTENT = {"workers", "rows_per_shard", "corpora", "describe", "trace", "describer", "tracer"}
"""Keys of the data section that decide no row, or whose paths may differ."""


@dataclass(frozen=True)
class _Set:
    stage: str
    key: str
    folder: Path
    manifest: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / MANIFEST


def _rebuild(folder: Path) -> str:
    """How a shard set is built again."""
    return f"remove {folder} and build it again (`rcot data build RECIPE --out {folder.parent}`)"


def shards(case: Case, notes: Notes) -> None:
    """Of every training stage still to be run, where the data stage is not."""
    if "data" in case.todo:
        return
    budget, seen = BUDGET_BYTES, set()
    for stage in case.training:
        section = case.recipe.sft if stage == "sft" else case.recipe.grpo(stage)
        found = _open(case, notes, stage, case.shards(section.shard_set))
        if found is None:
            continue
        if found.folder not in seen:
            budget = _files(notes, found, budget)
            seen.add(found.folder)
        _recipe(case, notes, found)
        _rows(case, notes, found)
        _lengths(case, notes, found)


def _open(case: Case, notes: Notes, stage: str, folder: Path) -> _Set | None:
    code, key = f"{stage}.shards", f"{section_key(stage)}.shard_set"
    path = folder / MANIFEST
    if not path.is_file():
        there = [p.parent.name for p in folder.parent.glob(f"*/{MANIFEST}")]
        hint = did_you_mean(folder.name, there)
        notes.error(
            code, f"{folder}: is no shard set (no manifest.json){hint}", cost=_LATER,
            fix=f"add data to stages, or correct {key}",
        )  # fmt: skip
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(manifest["files"], dict) and isinstance(manifest["rows"], dict)
        assert isinstance(manifest["recipe"], dict) and isinstance(manifest["counts"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AssertionError) as error:
        notes.error(
            code, f"{path}: is no manifest of a shard set ({type(error).__name__})", cost=_LATER,
            fix=_rebuild(folder),
        )  # fmt: skip
        return None
    return _Set(stage, key, folder, manifest)


def _files(notes: Notes, s: _Set, budget: int) -> int:
    """Files named by the manifest are there; parquet files are the ones it names. What is left of
    the budget."""
    files = s.manifest["files"]
    missing = [name for name in files if not _inside(s.folder, name)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        notes.error(
            f"{s.stage}.files", f"{s.folder / missing[0]}: is in the manifest, and missing{more}",
            cost=_LATER, fix="copy the whole folder again, or " + _rebuild(s.folder),
        )  # fmt: skip
    unchecked = 0
    for path in visible(s.folder.glob("*.parquet")):
        if path.name not in files:
            notes.error(
                f"{s.stage}.files", f"{path}: not named by the manifest, and would be read",
                cost=_LATER, fix="remove it",
            )  # fmt: skip
            continue
        size = path.stat().st_size
        if size > budget:
            unchecked += 1
            continue
        budget -= size
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != files[path.name]:
            notes.error(
                f"{s.stage}.checksum", f"{path}: its sha256 is not the manifest's", cost=_LATER,
                fix="copy the file again, or " + _rebuild(s.folder),
            )  # fmt: skip
    if unchecked:
        notes.unknown(
            f"{s.stage}.checksum", f"{s.folder}: checksums of {unchecked} large parquet files were "
            "not compared", cost=_LATER, fix=f"rcot data check {s.folder.parent}",
        )  # fmt: skip
    return budget


def _inside(folder: Path, name: str) -> bool:
    path = folder / name
    return ".." not in Path(name).parts and not Path(name).is_absolute() and path.is_file()


def _recipe(case: Case, notes: Notes, s: _Set) -> None:
    """The canvas, prompts and data section that the rows were made with."""
    made, now = s.manifest["recipe"], case.recipe
    canvas = now.data.canvas or now.canvas.image
    if made.get("canvas") != canvas:
        notes.error(
            f"{s.stage}.canvas", f"{s.path}: rows were made for a canvas of {made.get('canvas')} "
            f"pixels, and canvas.image={canvas}",
            cost="boxes in another frame than rewards: days, and no error", fix=_rebuild(s.folder),
        )  # fmt: skip
    if made.get("prompts") != Path(now.prompts).stem:
        notes.error(
            f"{s.stage}.prompts", f"{s.path}: rows hold prompts {made.get('prompts')!r}, and "
            f"prompts={now.prompts}",
            cost="a policy that is asked otherwise than it was trained", fix=_rebuild(s.folder),
        )  # fmt: skip
    ours = now.data.model_dump(mode="json")
    data = made.get("data") if isinstance(made.get("data"), dict) else {}
    differs = [
        k for k, v in data.items()
        if k in ours and k not in _NOT_CONTENT and v is not None and ours[k] is not None
        and not _same(k, v, ours[k], s.folder.name)
    ]  # fmt: skip
    if differs:
        notes.warning(
            f"{s.stage}.recipe", f"{s.path}: rows were made with another recipe (data."
            f"{', data.'.join(sorted(differs))})", cost="a result that its recipe does not explain",
            fix=_rebuild(s.folder),
        )  # fmt: skip


def _same(key: str, made: Any, now: Any, name: str) -> bool:
    if key == "sets":  # the other sets may have been given up, or come later
        return isinstance(made, dict) and name in now and made.get(name) == now[name]
    if isinstance(made, dict) and isinstance(now, dict):  # a section may have got keys since
        return all(now[k] == v for k, v in made.items() if k in now)
    return bool(made == now)


def _rows(case: Case, notes: Notes, s: _Set) -> None:
    """Columns and numbers of rows, from the parquet files' footers; the task that they ask."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    counted = {"train": 0, "val": 0}
    wanted = ("messages", "images") if s.stage == "sft" else (
        "data_source", "prompt", "images", "reward_model", "extra_info",
    )  # fmt: skip
    for path in visible(s.folder.glob("*.parquet")):
        try:
            footer = pq.ParquetFile(path)
        except (OSError, pa.ArrowException):
            notes.error(
                f"{s.stage}.parquet", f"{path}: is not a readable parquet file", cost=_LATER,
                fix="copy the file again, or " + _rebuild(s.folder),
            )  # fmt: skip
            return
        absent = [c for c in wanted if c not in footer.schema_arrow.names]
        if absent:
            notes.error(
                f"{s.stage}.columns", f"{path}: lacks the column {absent[0]}, which verl reads",
                cost=_LATER, fix="name a set made for this stage in " + s.key,
            )  # fmt: skip
            return
        split = path.name.partition("-")[0]
        counted[split] = counted.get(split, 0) + footer.metadata.num_rows
    for split, rows in s.manifest["rows"].items():
        if counted.get(split, 0) != rows:
            notes.error(
                f"{s.stage}.row_count", f"{s.path}: says {rows} rows of {split}, and the parquet "
                f"files have {counted.get(split, 0)}", cost=_LATER, fix=_rebuild(s.folder),
            )  # fmt: skip
            return
    if s.stage in GRPO:
        _task(case, notes, s, counted)
    elif counted["train"] < case.recipe.sft.batch_size:
        notes.error(
            "sft.batch", f"{s.folder}: {counted['train']} rows make no batch of "
            f"sft.batch_size={case.recipe.sft.batch_size}", cost="a stage without a step",
            fix="lower sft.batch_size",
        )  # fmt: skip


def _task(case: Case, notes: Notes, s: _Set, rows: Mapping[str, int]) -> None:
    g, tasks = case.recipe.grpo(s.stage), tasks_of(case, s.stage)
    counts, task = s.manifest["counts"].get("train") or {}, " or ".join(sorted(tasks))
    of_task = sum(counts.get(t, 0) for t in tasks)
    if of_task < rows["train"]:
        notes.error(
            f"{s.stage}.task", f"{s.path}: {of_task} of {rows['train']} rows ask {task}, which "
            f"the reward of {s.stage} scores", cost="an error, or rewards of 0, at other rows",
            fix=f"name a set of {task} rows alone in {s.key}",
        )  # fmt: skip
    if rows["train"] < g.prompts_per_step:
        notes.error(
            f"{s.stage}.rows", f"{s.folder}: {rows['train']} rows make no step of "
            f"prompts_per_step={g.prompts_per_step} prompts", cost="a stage without a step",
            fix=f"lower {section_key(s.stage)}.prompts_per_step",
        )  # fmt: skip
    if not rows["val"]:
        notes.error(
            f"{s.stage}.val", f"{s.folder}: has no val shard, and verl opens one", cost=_LATER,
            fix=f"set data.sets.{s.folder.name}.val, and build again",
        )  # fmt: skip


def _lengths(case: Case, notes: Notes, s: _Set) -> None:
    """Exact token counts against the limits, and the pixels that they were counted for."""
    tokens = s.manifest.get("tokens")
    train = ((tokens or {}).get("splits") or {}).get("train")
    if not train:
        notes.unknown(
            f"{s.stage}.lengths", f"{s.path}: rows' tokens were not counted (the policy was not "
            "there when they were made)", cost="an error at the first long prompt",
            fix=f"rcot data check {s.folder.parent} --model FOLDER",
        )  # fmt: skip
        return
    if s.stage == "sft":
        _over(notes, s, "total", train, "sft.max_length", case.recipe.sft.max_length)
        _responses(case, notes, s)
    else:
        key, g = section_key(s.stage), case.recipe.grpo(s.stage)
        _over(notes, s, "prompt", train, f"{key}.max_prompt_length", g.max_prompt_length)


def _over(notes: Notes, s: _Set, what: str, train: Any, key: str, limit: int) -> None:
    most = train[f"{what}_tokens"]["most"]
    if most > limit:
        notes.error(
            f"{s.stage}.lengths", f"{s.path}: the longest row has {most} {what} tokens, and "
            f"{key}={limit}", cost="an error when verl comes to that row", fix=f"{key}={most}",
        )  # fmt: skip


def _responses(case: Case, notes: Notes, s: _Set) -> None:
    """The longest response that SFT teaches fits into what GRPO lets the policy say."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    longest = 0
    columns = ["extra_info.prompt_tokens", "extra_info.total_tokens"]
    try:
        for path in sorted(s.folder.glob("train-*.parquet")):
            table = pq.ParquetFile(path).read(columns=columns)
            if "extra_info" not in table.column_names:
                return  # rows of another kind; the manifest's counts are not of this file
            for info in table.column("extra_info").to_pylist():
                total, prompt = info.get("total_tokens"), info.get("prompt_tokens")
                if total is not None and prompt is not None:
                    longest = max(longest, total - prompt)
    except (OSError, pa.ArrowException):
        return  # `_rows` says what is wrong with the file
    for stage in case.grpo:
        g, key = case.recipe.grpo(stage), section_key(stage)
        if longest > g.max_response_length:
            notes.error(
                f"{stage}.response_tokens", f"{key}.max_response_length={g.max_response_length}: "
                f"SFT's traces in {s.folder} have up to {longest} tokens",
                cost="responses cut before their answer: rewards of 0 for what SFT taught",
                fix=f"{key}.max_response_length={longest + 64}",
            )  # fmt: skip
