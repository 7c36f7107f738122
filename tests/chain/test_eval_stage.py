"""The stage `eval` of a run: benchmarks that can be scored here are, and others are named."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

from cluster.preflight.plan import examine
from data_pipelines.corpora import open_corpus
from data_pipelines.toy.layouts import write_corpus
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.runfolder import RunFolder
from rcot_rl.stages import eval_stage


def test_benchmark_without_masks_is_skipped_and_others_are_scored(tmp_path):
    """As Ref-YouTube-VOS' validation split is published: its server alone can score it."""
    public, other = tmp_path / "ytvos", tmp_path / "davis"
    write_corpus(public, "ref-youtube-vos", "valid", 2, 1, "lattice")
    shutil.rmtree(public / "valid" / "Annotations")
    (public / "valid" / "meta.json").unlink(missing_ok=True)
    write_corpus(other, "davis17", "valid", 2, 1, "lattice")
    benchmarks = (
        f"[{{dataset: ref-youtube-vos, root: {public}}}, {{dataset: davis17, root: {other}}}]"
    )
    settings = [f"eval.benchmarks={benchmarks}", "eval.checkpoints=[sft]", "eval.baselines=false"]
    recipe = load_recipe("laptop", settings)
    findings = {f.code: f.message for f in examine(recipe, tmp_path / "run").findings}
    assert str(public) in findings["eval.masks"]
    folder = RunFolder.claim(tmp_path / "run", recipe)
    (folder.root / "predictions" / "davis17-valid").mkdir(parents=True)
    lines = []
    console = SimpleNamespace(line=lines.append, progress=lambda *_: None)
    state = SimpleNamespace(recipe=recipe, folder=folder, console=console)
    scores = eval_stage.run(state, "eval")["J&F"]
    assert list(scores) == ["davis17-valid"]
    files = sorted(p.name for p in (folder.root / "eval").iterdir())
    assert files == ["davis17-valid.csv", "davis17-valid.json"]
    assert json.loads((folder.root / "eval" / "davis17-valid.json").read_text())["missing"]
    assert any("davis17-valid: official DAVIS evaluation" in line for line in lines)
    assert any(
        "ref-youtube-vos-valid has no ground truth and is not scored" in line for line in lines
    )


def test_two_splits_of_a_dataset_are_scored_and_kept_apart(tmp_path):
    root = tmp_path / "run" / "corpora" / "mevis"
    settings = [
        "toy.corpora=[{layout: mevis, split: train, videos: 3}, "
        "{layout: mevis, split: valid_u, videos: 2}]",
        "data.corpora=[{dataset: mevis}]",
        "eval.benchmarks=[{dataset: mevis, split: train}, {dataset: mevis, split: valid_u}]",
        "eval.checkpoints=[sft]",
        "eval.baselines=false",
    ]
    recipe = load_recipe("laptop", settings)
    folder = RunFolder.claim(tmp_path / "run", recipe)
    expressions = {}
    for split, videos in (("train", 3), ("valid_u", 2)):
        write_corpus(root, "mevis", split, videos, 1, "lattice")
        (folder.root / "predictions" / f"mevis-{split}").mkdir(parents=True)
        corpus = open_corpus("mevis", root, split)
        expressions[split] = sum(len(v.expressions) for v in corpus.videos())
    console = SimpleNamespace(line=lambda text: None, progress=lambda *_: None)
    state = SimpleNamespace(recipe=recipe, folder=folder, console=console)
    eval_stage.run(state, "eval")
    for split, count in expressions.items():
        result = json.loads((folder.root / "eval" / f"mevis-{split}.json").read_text())
        assert (result["split"], result["n_expressions"]) == (split, count)
