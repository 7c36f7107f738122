"""Where a GRPO stage starts: verl gets the reference's model, and step 0 if the policy differs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rcot_rl.recipe.loader import load_recipe
from rcot_rl.runfolder import RunFolder
from rcot_rl.stages import grpo_stage
from rcot_rl.stages.stage_run import StageRun
from rcot_rl.training import jobs


class Stop(Exception):
    """Raised where the trainer would start."""


@pytest.mark.parametrize(
    ("recipe", "stage", "reference", "previous"),
    [
        ("rcot_seg_3b", "grpo-aks", "sft", None),
        ("rcot_seg_3b", "grpo-ktg", "sft", "grpo-aks"),
        ("grpo_ktg", "grpo-ktg", "sft", "grpo-aks"),
        ("rcot_seg_3b_joint", "grpo-joint", "sft", None),
        ("rcot_seg_3b_no_sft", "grpo-aks", "base", None),
        ("rcot_seg_3b_no_sft", "grpo-ktg", "base", "grpo-aks"),
    ],
)
def test_a_stage_starts_from_the_policy_before_it_against_its_reference(
    tmp_path: Path, monkeypatch, recipe: str, stage: str, reference: str, previous: str | None
) -> None:
    loaded = load_recipe(recipe)
    folder = RunFolder.claim(tmp_path / "run", loaded)
    models, starts = [], []

    def grpo_job(*arguments: object, **options: object) -> None:
        models.append(arguments[2])
        raise Stop

    monkeypatch.setattr(jobs, "grpo_job", grpo_job)
    monkeypatch.setattr(jobs, "newest_checkpoint", lambda path: path)
    monkeypatch.setattr(jobs, "start_job", lambda recipe, stage, start, out: [start])
    monkeypatch.setattr(StageRun, "model_of", lambda self, name: name)
    monkeypatch.setattr(StageRun, "run_child", lambda self, stage, words, log: starts.extend(words))
    run = StageRun(loaded, folder, SimpleNamespace(environment={}), SimpleNamespace())
    with pytest.raises(Stop):
        grpo_stage.run(run, stage)
    assert models == [reference]
    assert starts == ([] if previous is None else [folder.stage(previous) / "checkpoints"])
