"""`rcot preflight` on built shards: complete ones pass, and each defect is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.preflight.checks import built_shards
from cluster.preflight.checks.findings import Finding, Report

Built = tuple[Path, list[str]]


def change_manifest(root: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "shards" / name / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def finding_of(report: Report, code: str) -> Finding:
    of_code = [f for f in report.findings if f.code == code]
    assert of_code, report.text()
    return of_code[0]


def test_complete_shards_have_no_finding(look: Callable[..., Report], built: Built) -> None:
    root, overrides = built
    (root / "recipe.yaml").unlink(missing_ok=True)
    report = look("laptop", *overrides, root=root)
    about = {f.code for f in report.findings} - {"versions", "folder.recipe", "eval.last"}
    assert about == set(), report.text()


def test_missing_and_unknown_files_are_named(look: Callable[..., Report], built: Built) -> None:
    root, overrides = built
    folder = root / "shards" / "grpo-aks-480"
    media = next(folder.glob("media/**/*.jpg"))
    media.unlink()
    (folder / "train-00007-of-00001.parquet").write_bytes(b"")
    report = look("laptop", *overrides, root=root)
    messages = [f.message for f in report.findings if f.code == "grpo-aks.files"]
    assert any(str(media) in m for m in messages)
    assert any("train-00007" in m for m in messages)


def test_a_changed_byte_is_found_within_the_budget(
    look: Callable[..., Report], built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, overrides = built
    path = next((root / "shards" / "grpo-ktg-960").glob("train-*.parquet"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)
    assert (
        str(path) in finding_of(look("laptop", *overrides, root=root), "grpo-ktg.checksum").message
    )
    monkeypatch.setattr(built_shards, "BUDGET_BYTES", 10)
    unread = finding_of(look("laptop", *overrides, root=root), "grpo-ktg.checksum")
    assert unread.severity == "unknown" and "rcot data check" in unread.fix


def test_a_truncated_parquet_file_is_an_error(look: Callable[..., Report], built: Built) -> None:
    root, overrides = built
    path = next((root / "shards" / "sft-384").glob("train-*.parquet"))
    path.write_bytes(path.read_bytes()[:100])
    report = look("laptop", *overrides, root=root)
    assert str(path) in finding_of(report, "sft.parquet").message
    assert finding_of(report, "sft.checksum").severity == "error"


def test_a_missing_column_is_named(look: Callable[..., Report], built: Built) -> None:
    root, overrides = built
    path = next((root / "shards" / "grpo-aks-480").glob("train-*.parquet"))
    pq.write_table(pq.read_table(path).drop_columns(["reward_model"]), path)
    assert (
        "reward_model"
        in finding_of(look("laptop", *overrides, root=root), "grpo-aks.columns").message
    )


def test_fewer_rows_than_in_the_manifest_are_an_error(
    look: Callable[..., Report], built: Built
) -> None:
    root, overrides = built
    path = next((root / "shards" / "grpo-aks-480").glob("train-*.parquet"))
    pq.write_table(pq.read_table(path).slice(0, 20), path)
    message = finding_of(look("laptop", *overrides, root=root), "grpo-aks.row_count").message
    assert "says 32 rows of train, and the parquet files have 20" in message


@pytest.mark.parametrize(
    ("name", "change", "code", "says"),
    [
        ("grpo-aks-480", lambda m: m["recipe"].update(canvas=840), "grpo-aks.canvas", "840 pixels"),
        (
            "grpo-ktg-960",
            lambda m: m["recipe"].update(prompts="qwen"),
            "grpo-ktg.prompts",
            "'qwen'",
        ),
        (
            "grpo-ktg-960",
            lambda m: m["recipe"]["data"].update(a_to_b=3.0),
            "grpo-ktg.recipe",
            "data.a_to_b",
        ),
        (
            "sft-384",
            lambda m: m["recipe"]["data"]["sets"]["sft-384"].update(ktg=9),
            "sft.recipe",
            "data.sets",
        ),
        ("grpo-ktg-960", lambda m: m.update(tokens=None), "grpo-ktg.lengths", "not counted"),
        ("grpo-aks-480", lambda m: m.pop("files"), "grpo-aks.shards", "no manifest"),
        (
            "grpo-aks-480",
            lambda m: m["counts"]["train"].update(aks=3),
            "grpo-aks.task",
            "3 of 32 rows ask aks",
        ),
    ],
)
def test_a_manifest_of_another_recipe_is_reported(
    look: Callable[..., Report], built: Built, name: str, change: Any, code: str, says: str
) -> None:
    root, overrides = built
    change_manifest(root, name, change)
    finding = finding_of(look("laptop", *overrides, root=root), code)
    assert says in finding.message and name in finding.message


@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("canvas.image=140", "grpo-aks.canvas", "canvas.image=140"),
        ("prompts=qwen", "sft.prompts", "prompts=qwen"),
        (
            "train.grpo-ktg.max_prompt_length=50",
            "grpo-ktg.lengths",
            "train.grpo-ktg.max_prompt_length=50",
        ),
        ("train.sft.max_length=60", "sft.lengths", "train.sft.max_length=60"),
        ("train.grpo-ktg.max_response_length=8", "grpo-ktg.response_tokens", "traces in"),
        (
            "train.grpo-ktg.shard_set=grpo-aks-480;train.grpo-ktg.rehearse=null",
            "grpo-ktg.reward_task",
            "the stage's rows ask aks",
        ),
        ("train.grpo-aks.shard_set=grpo-aks-481", "grpo-aks.shards", "did you mean grpo-aks-480?"),
        ("train.sft.shard_set=grpo-ktg-960", "sft.columns", "messages"),
        ("train.sft.batch_size=64", "sft.batch", "train.sft.batch_size=64"),
    ],
)
def test_a_recipe_that_does_not_fit_the_shards_is_an_error(
    look: Callable[..., Report], built: Built, override: str, code: str, says: str
) -> None:
    root, overrides = built
    finding = finding_of(look("laptop", *overrides, *override.split(";"), root=root), code)
    assert says in finding.message and finding.severity == "error"


def test_too_few_rows_for_a_step_and_no_validation_are_errors(
    look: Callable[..., Report], built: Built
) -> None:
    root, overrides = built
    more = ("grpo.prompts_per_step=64", "grpo.micro_batch_size=32")
    assert (
        "make no step"
        in finding_of(look("laptop", *overrides, *more, root=root), "grpo-aks.rows").message
    )
    folder = root / "shards" / "grpo-ktg-960"
    for path in folder.glob("val-*.parquet"):
        path.unlink()
    change_manifest(root, folder.name, lambda m: m["rows"].update(val=0))
    assert "val shard" in finding_of(look("laptop", *overrides, root=root), "grpo-ktg.val").message


def test_an_invalid_manifest_is_an_error(look: Callable[..., Report], built: Built) -> None:
    root, overrides = built
    path = root / "shards" / "grpo-aks-480" / "manifest.json"
    for text in ("", "[]", '{"files": 3}', "[" * 100_000, "\x00"):
        path.write_text(text)
        assert (
            str(path)
            in finding_of(look("laptop", *overrides, root=root), "grpo-aks.shards").message
        )


def test_parquet_without_lengths_is_no_crash(look: Callable[..., Report], built: Built) -> None:
    root, overrides = built
    path = next((root / "shards" / "sft-384").glob("train-*.parquet"))
    pq.write_table(pa.table({"messages": ["x"] * 32, "images": ["y"] * 32}), path)
    report = look("laptop", *overrides, root=root)
    assert finding_of(report, "sft.checksum").severity == "error"


def test_shards_of_another_form_of_response_are_refused(
    look: Callable[..., Report], built: Built
) -> None:
    root, overrides = built
    rewards = [f"train.grpo-{t}.reward={t}-answer-only" for t in ("aks", "ktg")]
    answer_only = [*overrides, "data.response=answer", *rewards]
    message = finding_of(look("laptop", *answer_only, root=root), "sft.response").message
    assert "rows were made with data.response=think_answer" in message
    for name in ("sft-384", "grpo-aks-480", "grpo-ktg-960"):
        change_manifest(root, name, lambda m: m["recipe"]["data"].update(response="answer"))
    assert not [f for f in look("laptop", *answer_only, root=root).findings if "response" in f.code]
