"""Shards are written atomically and once, with the same bytes however they were made."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hotcoco import mask as coco

from data_pipelines import shards
from data_pipelines.build import build as build_shards
from data_pipelines.parallel import ordered_map
from rcot_rl.errors import InputError
from rcot_rl.recipe.data_section import CorpusRef, DataSection, SetSize

build = partial(build_shards, canvas=56)


@pytest.fixture
def data(corpus_maker) -> DataSection:
    corpora = [
        CorpusRef(dataset=d, root=str(corpus_maker(d, "train", n_videos=12).root))
        for d in ("ref-youtube-vos", "mevis")
    ]
    sets = {"sft-x": SetSize(ktg=12, aks=8, val=2), "grpo-ktg-x": SetSize(ktg=8, val=2)}
    return DataSection(corpora=corpora, sets=sets, rows_per_shard=6, val_fraction=0.3)


def tree(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_workers_do_not_change_a_byte(data, tmp_path):
    build(data, tmp_path / "one", "qwen", seed=5)
    build(data.model_copy(update={"workers": 2}), tmp_path / "two", "qwen", seed=5)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    names = {p.name for p in (tmp_path / "one" / "sft-x").iterdir()}
    parquet = {f"train-{k:05d}-of-00004.parquet" for k in range(4)}
    others = {"val-00000-of-00001.parquet", "media", "card", "manifest.json", "README.md"}
    assert names == {*parquet, *others}


def test_manifest_lists_every_file_with_its_checksum(data, tmp_path):
    built = build(data, tmp_path, "qwen", seed=5)
    for name in data.sets:
        files = tree(tmp_path / name)
        del files["manifest.json"]
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest == built["sets"][name]
        assert manifest["files"] == files
        text = json.dumps(manifest["recipe"], sort_keys=True, separators=(",", ":"))
        assert manifest["recipe_hash"] == hashlib.sha256(text.encode()).hexdigest()
        assert manifest["ratios"]["train"]["ktg single:multi"] == 3.0


def test_a_finished_set_is_left_alone_and_another_plan_replaces_it(data, tmp_path):
    build(data, tmp_path, "qwen", seed=5)
    target = tmp_path / "sft-x" / "train-00000-of-00004.parquet"
    before = target.stat().st_mtime_ns
    build(data, tmp_path, "qwen", seed=5)
    assert target.stat().st_mtime_ns == before
    first = tree(tmp_path)
    build(data, tmp_path, "qwen", seed=6)
    assert tree(tmp_path) != first
    build(data, tmp_path, "qwen", seed=5)
    assert tree(tmp_path) == first
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_killed_build_resumes(data, tmp_path, monkeypatch):
    build(data, tmp_path / "whole", "qwen", seed=5)

    class Killed(BaseException):
        pass

    attempted = []
    original = shards.RowMaker.try_make

    def make(self, instance, folder, final):
        attempted.append(instance)
        if len(attempted) == 15:
            raise Killed
        return original(self, instance, folder, final)

    monkeypatch.setattr(shards.RowMaker, "try_make", make)
    with pytest.raises(Killed):
        build(data, tmp_path / "cut", "qwen", seed=5)
    assert not (tmp_path / "cut" / "sft-x").exists()
    attempted.clear()
    monkeypatch.setattr(
        shards.RowMaker,
        "try_make",
        lambda self, i, **to: attempted.append(i) or original(self, i, **to),
    )
    build(data, tmp_path / "cut", "qwen", seed=5)
    # Two files of six rows were finished; the rest of 24 + 10 rows is made now.
    assert len(attempted) == 34 - 12
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_a_folder_that_is_not_a_set_is_not_replaced(data, tmp_path):
    (tmp_path / "sft-x").mkdir()
    (tmp_path / "sft-x" / "thesis.txt").write_text("do not delete")
    with pytest.raises(InputError, match="not a shard set"):
        build(data, tmp_path, "qwen")
    assert (tmp_path / "sft-x" / "thesis.txt").read_text() == "do not delete"


def test_defects_are_named_quarantined_or_fatal(data, tmp_path):
    root = Path(data.corpora[1].root)
    path = root / "train" / "mask_dict.json"
    masks = json.loads(path.read_text())
    masks["100"][1] = {"size": [36, 52], "counts": "~"}
    masks["99"].pop()
    path.write_text(json.dumps(masks))
    frame = root / "train" / "JPEGImages" / "mevis-002" / "00003.jpg"
    frame.unlink()
    other = Path(data.corpora[0].root) / "train" / "Annotations" / "ref-youtube-vos-001"
    cv2.imwrite(str(other / "00010.png"), np.zeros((36, 52, 3), np.uint8))
    with pytest.raises(InputError, match="max_fault_share"):
        build(data, tmp_path / "strict", "qwen")
    assert not (tmp_path / "strict").exists()
    lax = data.model_copy(update={"max_fault_share": 0.5})
    manifest = build(lax, tmp_path / "lax", "qwen")["sets"]["sft-x"]
    listed = {(d["video"], d["expression_id"], d["reason"]) for d in manifest["dropped"]["defects"]}
    assert listed == {
        ("mevis-002", "", "missing_frame"),
        *(("ref-youtube-vos-001", e, "not_a_palette_png") for e in "012"),
        ("mevis-000", "0", "bad_rle"),
        ("mevis-000", "1", "mask_count"),
        # Expressions 3 and 4 name both annotations: the first in the order of ids is reported.
        ("mevis-000", "3", "bad_rle"),
        ("mevis-000", "4", "bad_rle"),
    }


def test_a_corpus_without_masks_is_refused(data, tmp_path):
    root = Path(data.corpora[1].root)
    (root / "train" / "mask_dict.json").unlink()
    with pytest.raises(InputError, match="no masks"):
        build(data, tmp_path, "qwen")


def test_ordered_map_keeps_order_and_errors():
    base = 10
    assert list(ordered_map(lambda x: x + base, range(50), 2, chunk=3)) == list(range(10, 60))

    def fail(x: int) -> int:
        if x == 7:
            raise InputError("seven", file="f", line=7)
        return x

    with pytest.raises(InputError) as caught:
        list(ordered_map(fail, range(50), 2, chunk=3))
    assert (caught.value.file, caught.value.line, str(caught.value)) == ("f", 7, "f:7: seven")


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("embed", [True, False])
def test_the_schema_is_the_one_that_datasets_would_write(traced, embed):
    from datasets import Features, Image, List

    schema = shards.row_schema(traced, embed, clips=True)
    features = Features.from_arrow_schema(schema.remove_metadata())
    if embed:
        features["images"] = List(Image())
    written = features.arrow_schema
    assert schema.remove_metadata().equals(written.remove_metadata())
    metadata, expected = (json.loads(s.metadata[b"huggingface"]) for s in (schema, written))
    assert metadata == expected


def test_frames_shared_by_two_sets_are_encoded_once(data, tmp_path, monkeypatch):
    from data_pipelines import rows

    encoded = []
    original = rows.encode
    monkeypatch.setattr(rows, "encode", lambda *a: encoded.append(1) or original(*a))
    built = build(data, tmp_path, "qwen", seed=5)
    media = {n for m in built["sets"].values() for n in m["files"] if n.startswith("media/")}
    assert len(encoded) == len(media)
    assert sum(sum(m["rows"].values()) for m in built["sets"].values()) > len(media)


def test_a_file_in_place_of_the_folder_is_named_before_anything_is_read(data, tmp_path):
    (tmp_path / "out").write_text("mine")
    reported = []
    with pytest.raises(InputError, match="cannot be written") as caught:
        build(data, tmp_path / "out", "qwen", progress=lambda *step: reported.append(step))
    assert caught.value.file.endswith("out") and not reported


def shown(folder: Path) -> list[dict]:
    return [r for p in sorted(folder.rglob("*.parquet")) for r in pq.read_table(p).to_pylist()]


def test_a_changed_corpus_is_rebuilt(data, tmp_path):
    """Whether expressions, masks or frames change, the rows follow the corpus."""
    build(data, tmp_path / "out", "qwen", seed=5)
    root = Path(data.corpora[1].root) / "train"
    for change in (_other_sentences, _other_masks, _other_frames):
        change(root)
        build(data, tmp_path / "out", "qwen", seed=5)
        build(data, tmp_path / change.__name__, "qwen", seed=5)
        assert tree(tmp_path / "out") == tree(tmp_path / change.__name__), change.__name__
    assert any("corrected" in r["prompt"][0]["content"] for r in shown(tmp_path / "out"))


def _other_sentences(root: Path) -> None:
    path = root / "meta_expressions.json"
    path.write_text(path.read_text().replace("the red", "the corrected red"))


def _other_masks(root: Path) -> None:
    path = root / "mask_dict.json"
    masks = json.loads(path.read_text())
    path.write_text(json.dumps({a: [m and _turned(m) for m in ms] for a, ms in masks.items()}))


def _turned(rle: dict) -> dict:
    done = coco.encode(np.asfortranarray(coco.decode(rle)[::-1, ::-1]))
    return {"size": rle["size"], "counts": done["counts"].decode()}


def _other_frames(root: Path) -> None:
    for path in root.rglob("*.jpg"):
        image = cv2.imread(str(path))
        cv2.imwrite(str(path), 255 - image, [cv2.IMWRITE_JPEG_QUALITY, 60])


def test_workers_end_with_a_killed_parent(tmp_path):
    script = (
        "import os, time\n"
        "from data_pipelines.parallel import ordered_map\n"
        "def work(_): os.write(1, b'%d\\n' % os.getpid()); time.sleep(600)\n"
        "list(ordered_map(work, range(2), 2, chunk=1))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    assert parent.wait() and parent.stdout.read() == b"", "closed by the last of them"
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}/exe")]
