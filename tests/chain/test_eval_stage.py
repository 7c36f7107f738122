"""The stage `eval` of a run: benchmarks that can be scored here are, and others are named."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

from cluster.preflight.plan import examine
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
    (folder.root / "predictions" / "davis17").mkdir(parents=True)
    lines = []
    console = SimpleNamespace(line=lines.append)
    state = SimpleNamespace(recipe=recipe, folder=folder, console=console)
    scores = eval_stage.run(state, "eval")["J&F"]
    assert list(scores) == ["davis17"]
    assert [p.name for p in (folder.root / "eval").iterdir()] == ["davis17.json"]
    assert json.loads((folder.root / "eval" / "davis17.json").read_text())["missing"]
    assert any(
        "ref-youtube-vos valid has no ground truth and is not scored" in line for line in lines
    )
