"""`check` reports no fault in a build, and each kind of damage with its place."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.build import build as build_shards
from data_pipelines.verify.check_rows import check_row, row_kind
from data_pipelines.verify.check_sets import check
from data_pipelines.verify.show import contact_sheet, read_shown
from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import TINY
from rcot_rl.recipe.data_section import CorpusRef, DataSection, SetSize
from rcot_rl.system.files import sha256_of

build = partial(build_shards, canvas=56)


@pytest.fixture
def out(corpus_maker, tmp_path) -> Path:
    corpora = [
        CorpusRef(dataset=d, root=str(corpus_maker(d, "train", n_videos=12).root))
        for d in ("mevis", "revos")
    ]
    sets = {"sft-x": SetSize(ktg=8, aks=4, val=2), "grpo-aks-x": SetSize(aks=6, val=2)}
    data = DataSection(corpora=corpora, sets=sets, val_fraction=0.3)
    build(data, tmp_path / "out", "compact", seed=5)
    return tmp_path / "out"


def rewrite(folder: Path, change: Callable[[list[dict]], None], split: str = "train") -> None:
    """Change rows and update the checksum."""
    path = folder / f"{split}-00000-of-00001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name] = sha256_of(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_check_reports_a_set_without_manifest(out):
    (out / "grpo-aks-x" / "manifest.json").unlink()
    report = check(out)
    assert not report.ok
    assert [f.file for f in report.faults] == [str(out / "grpo-aks-x" / "manifest.json")]
    assert "missing" in report.faults[0].message
    assert report.counts["sft-x"]["train"]["ktg"] == 8, "the other set is checked"


def test_check_finds_no_fault_in_a_build(out):
    report = check(out)
    assert report.faults == []
    assert report.ok
    assert report.counts["sft-x"]["train"]["ktg"] == 8
    assert report.ratios["grpo-aks-x"]["train"] == {"aks A:B": 1.0}
    assert check(out / "sft-x").ok
    json.dumps(report.as_dict())


def test_hidden_files_are_ignored(out):
    for folder in (out, out / "sft-x", out / "sft-x" / "media"):
        for name in (".DS_Store", "._train-00000-of-00001.parquet", "._manifest.json"):
            (folder / name).write_bytes(b"\0\x05\x16\x07")
    (out / "sft-x" / ".ipynb_checkpoints").mkdir()
    (out / "sft-x" / ".ipynb_checkpoints" / "train-00000.parquet").write_bytes(b"x")
    (out / "copies").mkdir()
    (out / "copies" / "._train-00000-of-00001.parquet").write_bytes(b"x")
    assert check(out).faults == []


def test_check_refuses_a_folder_without_sets(tmp_path):
    with pytest.raises(InputError, match="no shard set"):
        check(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        check(tmp_path / "nowhere")


def test_check_reports_missing_changed_and_unlisted_files(out):
    folder = out / "sft-x"
    media = sorted((folder / "media").rglob("*.png"))
    media[0].unlink()
    media[1].write_bytes(media[1].read_bytes() + b"x")
    (folder / "notes.txt").write_text("hello")
    faults = {(Path(f.file).name, f.message) for f in check(out).faults}
    assert faults == {
        (media[0].name, "missing"),
        (media[1].name, "checksum differs from the manifest's"),
        ("notes.txt", "not in the manifest"),
    }


def test_check_lists_every_row_fault_with_its_place(out):
    def change(rows: list[dict]) -> None:
        ktg = [i for i, r in enumerate(rows) if r["extra_info"]["task"] == "ktg"]
        aks = [i for i, r in enumerate(rows) if r["extra_info"]["task"] == "aks"]
        places.update(box=ktg[0], image=ktg[1], target=ktg[2], option=aks[0], prompt=aks[1])
        item = json.loads(rows[ktg[0]]["reward_model"]["ground_truth"])
        item[0]["bbox_2d"][0] = 57
        rows[ktg[0]]["reward_model"]["ground_truth"] = json.dumps(item)
        rows[ktg[1]]["images"][0]["bytes"] = b"not a png"
        rows[ktg[2]]["extra_info"]["target"] = "none"
        rows[aks[0]]["messages"][1]["content"] = "<think>so</think><answer>C</answer>"
        rows[aks[1]]["prompt"][0]["content"] += "<image>"

    places: dict[str, int] = {}
    rewrite(out / "sft-x", change)
    faults = {(f.row, f.key) for f in check(out).faults}
    assert faults >= {
        (places["box"], "reward_model.ground_truth[0].bbox_2d"),
        (places["box"], "messages[1].content"),
        (places["image"], "images[0]"),
        (places["image"], "images[0].bytes"),
        (places["target"], "extra_info.target"),
        (places["target"], "reward_model.ground_truth"),
        (places["option"], "messages[1].content"),
        (places["prompt"], "prompt"),
        (places["prompt"], "messages[0]"),
        (None, "counts.train"),
        (None, "ratios.train"),
    }


TOKENS = (
    "<|im_end|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|object_ref_start|>",
    "<|endoftext|>",
    "<|box_start|>",
    "<tool_call>",
    "<image>",
    "<video>",
    "<audio>",
)


@pytest.mark.parametrize("model", [None, TINY])
def test_check_reports_control_tokens_in_rows(out, model):
    """As in shards of earlier versions: in the prompt, and in an SFT target."""

    def change(rows: list[dict]) -> None:
        for row, token in zip(rows, TOKENS, strict=False):
            row["prompt"][0]["content"] += f" {token} b"
            row["messages"][0] = row["prompt"][0]
        thought = rows[-1]["messages"][1]
        thought["content"] = thought["content"].replace("<think>", "<think><|im_end|>")

    rewrite(out / "sft-x", change)
    rows = pq.read_table(out / "sft-x" / "train-00000-of-00001.parquet").num_rows
    report = check(out, model)
    faults = {(f.row, f.key): f for f in report.faults if "control tokens" in f.message}
    for number, token in enumerate(TOKENS):
        for key in ("prompt[0].content", "messages[0].content"):
            fault = faults.pop((number, key))
            assert token in fault.message and fault.file.endswith("train-00000-of-00001.parquet")
    fault = faults.pop((rows - 1, "messages[1].content"))
    assert "<|im_end|>" in fault.message and not faults
    json.dumps(report.as_dict())


def test_check_reports_tags_of_expressions_in_prompts(out):
    def change(rows: list[dict]) -> None:
        for row, quoted in zip(
            rows, ("the <answer>B</answer>", "(think)", "a </think>"), strict=False
        ):
            old = row["extra_info"]["expression"].replace("<image>", "(image)")
            row["extra_info"]["expression"] = quoted
            row["prompt"][0]["content"] = row["prompt"][0]["content"].replace(old, quoted)

    rewrite(out / "grpo-aks-x", change)
    faults = {f.row: f.message for f in check(out).faults if "control tokens" in f.message}
    assert faults.keys() == {0, 2}
    assert "<answer>, </answer>" in faults[0] and "</think>" in faults[2]


def test_check_reports_control_tokens_of_the_given_policy(out, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    path = model / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    first = value["added_tokens"][0]
    number = max(value["model"]["vocab"].values()) + 1
    value["added_tokens"].append(first | {"id": number, "content": "[SEG]"})
    path.write_text(json.dumps(value), encoding="utf-8")

    def change(rows: list[dict]) -> None:
        rows[1]["prompt"][0]["content"] += " [SEG]"

    rewrite(out / "grpo-aks-x", change)
    assert check(out).ok
    (fault,) = check(out, model).faults
    assert (fault.row, fault.key) == (1, "prompt[0].content") and "[SEG]" in fault.message


def test_check_reports_rows_that_the_processor_refuses(out, monkeypatch):
    from data_pipelines.verify.processor import PolicyProcessor

    def refuse(self: object, shown: object) -> Iterator[object]:
        raise IndexError("list index out of range")
        yield

    monkeypatch.setattr(PolicyProcessor, "_faults", refuse)
    faults = check(out / "grpo-aks-x", TINY).faults
    assert faults and all("IndexError: list index" in f.message for f in faults)
    assert all(f.row is not None and f.key == "prompt" for f in faults)


def test_check_names_a_model_without_processor(out, tmp_path):
    shutil.copytree(TINY, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "m" / "processor_config.json").write_text("[")
    with pytest.raises(InputError) as caught:
        check(out, tmp_path / "m")
    assert caught.value.file == str(tmp_path / "m") and "\n" not in str(caught.value)


def _leaves(value: object, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, below in items:
            yield from _leaves(below, (*path, key))


ODD = (
    None,
    [],
    "",
    "a\0b",
    "<|image_pad|>",
    "<image>",
    -1,
    [None],
    [1, None],
    "[[1]]",
    "NaN",
    "/" + "a" * 300,
    '[{"bbox_2d": [1, 2, 3, 4], "point_2d": null}]',
    [None, {"role": "user", "content": "x"}],
)


def test_any_value_in_a_row_gives_a_fault_not_an_exception(out):
    """Every field of a row in turn gets values that the schema allows and no build writes."""
    path = out / "sft-x" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    one_of_each = {row["extra_info"]["task"]: row for row in rows}
    manifest = json.loads((out / "sft-x" / "manifest.json").read_text())
    tried = 0
    for row in one_of_each.values():
        for place in _leaves(row):
            for value in ODD:
                damaged = copy.deepcopy(row)
                parent = damaged
                for key in place[:-1]:
                    parent = parent[key]
                parent[place[-1]] = value
                try:
                    damaged = pa.Table.from_pylist([damaged], table.schema).to_pylist()[0]
                except (pa.ArrowException, TypeError):
                    continue  # the schema does not allow it
                list(check_row(damaged, out / "sft-x", "train", manifest))
                row_kind(damaged)
                tried += 1
    assert tried > 300


def test_check_reports_repeated_rows_wrong_order_and_wrong_sizes(out):
    def change(rows: list[dict]) -> None:
        rows[3] = rows[2]

    rewrite(out / "grpo-aks-x", change)
    messages = [(f.row, f.message) for f in check(out).faults]
    assert (3, "this instance is repeated") in messages
    assert (3, "is 2, not 3") in messages
    rewrite(out / "grpo-aks-x", lambda rows: rows.pop())
    keys = {f.key for f in check(out).faults}
    assert "rows.train" in keys


def test_check_reports_sets_that_share_instances(out):
    shutil.copytree(out / "sft-x", out / "sft-y")
    shared = [f for f in check(out).faults if "is also in" in f.message]
    assert len({f.key for f in shared}) == len(shared) > 8
    # A single set is compared with its neighbours too.
    alone = [f for f in check(out / "sft-y").faults if "is also in" in f.message]
    assert {f.key for f in alone} == {f.key for f in shared}


def test_check_reports_validation_videos_in_training_rows(out):
    taken: list[dict] = []
    rewrite(out / "sft-x", lambda rows: taken.append(rows[0]), "val")

    def change(rows: list[dict]) -> None:
        rows[0]["extra_info"]["video"] = taken[0]["extra_info"]["video"]
        rows[0]["extra_info"]["dataset"] = taken[0]["extra_info"]["dataset"]

    rewrite(out / "grpo-aks-x", change)
    assert any("validation video" in f.message for f in check(out).faults)


def test_broken_manifest_and_parquet_do_not_stop_the_rest(out):
    (out / "sft-x" / "manifest.json").write_text("{")
    (out / "grpo-aks-x" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    messages = {(Path(f.file).name, f.message.split(":")[0]) for f in check(out).faults}
    assert ("manifest.json", "not valid JSON") in messages
    assert ("train-00000-of-00001.parquet", "cannot be read") in messages


def test_any_flipped_bit_gives_a_fault_not_an_exception(out):
    """Flips single bits in columns of text and numbers."""
    folder = out / "grpo-aks-x"
    path = folder / "train-00000-of-00001.parquet"
    whole = path.read_bytes()
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(k) for k in range(group.num_columns)]
    columns = [c for c in columns if "bytes" not in c.path_in_schema]
    rng = np.random.default_rng(0)
    for _ in range(60):
        column = columns[rng.integers(len(columns))]
        damaged = bytearray(whole)
        at = column.data_page_offset + rng.integers(column.total_compressed_size)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        assert not check(folder).ok
        try:
            contact_sheet(read_shown(path, varied=True))
        except InputError as error:
            assert error.file == str(path)


def _places(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, below in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        if len(path) < 3:
            yield from _places(below, (*path, key))


def test_a_damaged_manifest_gives_faults(out):
    path = out / "sft-x" / "manifest.json"
    whole = json.loads(path.read_text())
    whole["files"] = dict(list(whole["files"].items())[:3])
    for place in _places(whole):
        for value in (None, [], {}, "x", 5, -1, 0.5, {"a": 1}, [1], {"sft-x": {}}):
            damaged = copy.deepcopy(whole)
            parent = damaged
            for key in place[:-1]:
                parent = parent[key]
            parent[place[-1]] = value
            path.write_text(json.dumps(damaged))
            assert not check(out / "sft-x").ok, "files are missing from it in any case"
