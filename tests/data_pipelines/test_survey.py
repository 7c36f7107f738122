"""Tracing and building plan the same rows, whatever the corpora and descriptions lack."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from data_pipelines.build import build
from data_pipelines.corpora import open_corpus
from data_pipelines.planning.row_drawing import SPLITS
from data_pipelines.toy.layouts import write_corpus
from data_pipelines.traces.texts import open_descriptions, open_traces
from rcot_rl.annotation.tracer import _Tracer
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.recipe.schema import Recipe

SETS = {
    "sft-x": {"ktg": 12, "aks": 6, "val": 3},
    "grpo-aks-x": {"aks": 8, "val": 2},
    "grpo-ktg-x": {"ktg": 8, "val": 2},
}


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    write_corpus(tmp_path / "mevis", "mevis", "train", 16, 5, "rich")
    values = {
        "extends": "laptop.yaml",
        "canvas": {"image": 56},
        "data": {
            "corpora": [{"dataset": "mevis", "root": str(tmp_path / "mevis")}],
            "sets": SETS,
            "describe": "template",
            "trace": "template",
            "keyframe": "any_visible",
            "val_fraction": 0.2,
            "max_fault_share": 0.5,
            "workers": 1,
            "tracer": {"model": "tiny"},
        },
        "train": {
            "sft": {"shard_set": "sft-x"},
            "grpo-aks": {"shard_set": "grpo-aks-x"},
            "grpo-ktg": {"shard_set": "grpo-ktg-x"},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path, [])


def built(recipe: Recipe, out: Path) -> Iterator[dict]:
    build(recipe.data, out, recipe.prompts, seed=recipe.seed, canvas=recipe.canvas.image)
    for split in SPLITS:
        for shard in sorted((out / "sft-x").glob(f"{split}-*.parquet")):
            yield from (r["extra_info"] for r in pq.read_table(shard).to_pylist())


def planned(recipe: Recipe, out: Path) -> list[tuple]:
    tracer = _Tracer(recipe, out)
    with tracer.annotator.cache:
        return sorted(w.key for w in tracer.plan({}))


def keys(rows: Iterator[dict]) -> list[tuple]:
    names = ("task", "dataset", "video", "expression_id", "frame")
    return sorted({tuple(info[n] for n in names) for info in rows})


def undecodable(path: Path, height: int, width: int) -> None:
    """Write a JPEG with a header and an end marker, and nothing in between."""
    frame = struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\x00"
    path.write_bytes(b"\xff\xd8\xff\xc0" + frame + b"\xff\xd9")


def test_build_and_trace_plan_alike_with_undecodable_frames(recipe, tmp_path):
    first = list(built(recipe, tmp_path / "first"))
    corpus = open_corpus("mevis", tmp_path / "mevis", "train")
    shown = {(i["video"], i["frame"]): i["source_size"] for i in first}
    for number, ((video, frame), size) in enumerate(sorted(shown.items())):
        if number % 4 == 0:
            undecodable(corpus.frame_path(video, frame), *size)
    second = list(built(recipe, tmp_path / "second"))
    lost = set(sorted(shown)[::4])
    assert len(second) == len(first)
    assert not lost & {(i["video"], i["frame"]) for i in second}
    assert planned(recipe, tmp_path / "texts") == keys(iter(second))
    manifest = json.loads((tmp_path / "second" / "sft-x" / "manifest.json").read_text())
    assert manifest["dropped"]["defects_by_reason"]["unreadable_frame"] >= len(lost)


def test_build_and_trace_plan_alike_without_descriptions(recipe, tmp_path):
    corpus = open_corpus("mevis", tmp_path / "mevis", "train")
    path = tmp_path / "descriptions.jsonl"
    lines = [
        {"dataset": "mevis", "video": v.id, "description": "" if k % 5 == 0 else "A scene."}
        for k, v in enumerate(corpus.videos())
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = recipe.data.model_copy(update={"describe": str(path)})
    recipe = recipe.model_copy(update={"data": data})
    rows = list(built(recipe, tmp_path / "out"))
    assert planned(recipe, tmp_path / "texts") == keys(iter(rows))
    assert {i["video"] for i in rows}.isdisjoint(x["video"] for x in lines if not x["description"])


@pytest.mark.parametrize("borrowed", [0, 4])
def test_too_many_undescribed_videos_stop_the_build(recipe, tmp_path, borrowed):
    path = tmp_path / "descriptions.jsonl"
    video = open_corpus("mevis", tmp_path / "mevis", "train").videos()[0]
    line = {"dataset": "mevis", "video": video.id, "description": "A scene."}
    path.write_text(json.dumps(line))
    update = {"describe": str(path), "zero_target_foreign": borrowed, "allow_smaller": True}
    data = recipe.data.model_copy(update=update)
    with pytest.raises(InputError, match="max_fault_share"):
        build(data, tmp_path / "out", recipe.prompts, canvas=56)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"dataset": "mevis", "video": "a", "description": "A dog \\ud83d"}', "surrogate"),
        ('{"dataset": "mevis", "video": "a", "n": %s}' % ("9" * 5000), "not valid JSON"),
        ('{"dataset": "mevis", "video": "a"}', "missing"),
    ],
)
def test_invalid_description_lines_are_refused(tmp_path, text, message):
    path = tmp_path / "d.jsonl"
    path.write_text('{"dataset": "mevis", "video": "b", "description": "x"}\n' + text)
    with pytest.raises(InputError, match=message) as caught:
        open_descriptions(str(path), [])
    assert caught.value.line == 2


def test_a_refusal_counts_even_without_causes(tmp_path):
    line = {
        "task": "aks",
        "dataset": "mevis",
        "video": "a",
        "expression_id": "0",
        "frame": "0",
        "response": "no",
        "accepted": False,
        "causes": None,
    }
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(line))
    traces = open_traces(str(path), [])
    assert not traces.responses and list(traces.refused.values()) == [()]
    path.write_text(json.dumps({**line, "causes": 5}))
    with pytest.raises(InputError, match="must be a list"):
        open_traces(str(path), [])


def test_a_tracer_that_is_always_refused_stops_with_counts_of_its_verdicts(recipe, tmp_path):
    """Everything is refused: the verdicts are written, and the message counts them."""
    data = recipe.data.model_copy(update={"allow_smaller": True})
    tracer = _Tracer(recipe.model_copy(update={"data": data}), tmp_path / "texts")
    with tracer.annotator.cache as cache, pytest.raises(InputError) as caught:
        while True:
            for wanted in tracer.plan_or_verdicts(tmp_path / "texts"):
                for number in range(tracer.tries):
                    ask = tracer._ask(wanted, number)
                    if ask.key not in cache:
                        cache.add(ask.key, {"response": "no", "tokens": 1})
    assert "responses: malformed" in str(caught.value)
    path = tmp_path / "texts" / "traces.jsonl"
    assert caught.value.file == str(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines and not any(line["accepted"] for line in lines)
