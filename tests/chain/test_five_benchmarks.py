"""Predict and score toy corpora in all five layouts, in several variants (real stack).

Some queries have no target. The finished run is then extended by another variant.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from data_pipelines.corpora import open_corpus
from data_pipelines.toy.arguments import SINGLE_TARGET
from data_pipelines.toy.layouts import write_corpus

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SPLITS = {
    "ref-youtube-vos": "train",  # valid is published without objects
    "mevis": "valid_u",
    "revos": "valid",
    "reasonvos": "valid",
    "davis17": "valid",
}


def write_recipe(folder: Path, variants: dict[str, dict[str, int]]) -> Path:
    recipe = {
        "extends": str(ROOT / "recipes" / "laptop.yaml"),
        "name": "five",
        "stages": ["predict", "eval", "report"],
        "models": {"policy": "tiny-trained"},
        "predict": {"zero_target": False, "variants": variants},
        "eval": {
            "benchmarks": [
                {"dataset": dataset, "root": str(folder / dataset), "split": split, "limit": 6}
                for dataset, split in SPLITS.items()
            ],
            "checkpoints": ["base"],
            "heldout_prompts": 0,
            "oracles": True,
        },
    }
    file = folder / "five.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_all_layouts_are_predicted_and_scored_in_all_variants(tmp_path, start_rcot) -> None:
    for dataset, split in SPLITS.items():
        absent = 0.0 if dataset in SINGLE_TARGET else 0.3
        write_corpus(tmp_path / dataset, dataset, split, 4, 3, "lattice", absent_share=absent)
    out = tmp_path / "run"
    for variants in ({"no-aks": {"rounds": 0}}, {"no-aks": {"rounds": 0}, "light": {"rounds": 2}}):
        recipe = write_recipe(tmp_path, variants)
        before = {f: f.stat().st_mtime_ns for f in out.rglob("trace.json")}
        assert start_rcot("run", str(recipe), "--out", str(out)).wait(400) == 0
        assert all(f.stat().st_mtime_ns == t for f, t in before.items()), "existing ones are kept"
        for dataset, split in SPLITS.items():
            _check(out, tmp_path, dataset, split, variants)
    assert (out / "report.html").is_file()


def _check(out: Path, root: Path, dataset: str, split: str, variants: dict[str, object]) -> None:
    corpus = open_corpus(dataset, root / dataset, split)
    pairs = [(v, e) for v in corpus.videos() for e in v.expressions][:6]
    scored = json.loads((out / "eval" / f"{dataset}-{split}.json").read_text())
    names = {"base", *(f"base@{variant}" for variant in variants)}
    assert set(scored["checkpoints"]) == names
    assert {"first-frame", "oracle-keyframe", "oracle-boxes", "oracle-both"} <= set(
        scored["baselines"]
    )
    for result in scored["checkpoints"].values():
        assert result["n_expressions"] == len(pairs)
        assert result["missing"] == result["faults"] == result["defects"] == []
    # with true boxes on the true keyframe, SAM2 is right wherever there is a target
    both = scored["baselines"]["oracle-both"]
    assert both["J&F"] >= scored["checkpoints"]["base"]["J&F"]
    absent = [e for _, e in pairs if not e.object_ids]
    if absent:
        assert both["per_subset"]["no_target"]["N-Acc"] == 100
    for video, expression in pairs:
        folder = out / "predictions" / f"{dataset}-{split}" / video.id / expression.id
        assert {p.stem for p in folder.glob("*.png")} == set(video.frames)
    with (out / "eval" / f"{dataset}-{split}.csv").open(encoding="utf-8-sig") as file:
        assert len(list(csv.reader(file))) > len(pairs) * len(names)
