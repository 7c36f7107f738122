"""`rcot study`: which runs it makes, how it resumes, and what it says about failures."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.supervise.processes import StageFailed
from rcot_rl.cli.main import app
from rcot_rl.errors import InputError
from rcot_rl.monitoring.study.study_results import read_results
from rcot_rl.runfolder import RunFolder
from rcot_rl.study_runs import StudyOutcome, StudyTask, recipes_in, run_study, study_tasks

COMMON = """
extends: laptop.yaml
name: common
eval: {benchmarks: [{dataset: mevis, split: valid_u}], checkpoints: [sft, grpo-ktg]}
"""
TABLES = "report: {paper_tables: {table-15: {explicit CoT: grpo-ktg}}}\n"


@pytest.fixture
def recipes(tmp_path: Path, recipe_folder: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    common = COMMON.replace("laptop.yaml", str(recipe_folder / "laptop.yaml"))
    (folder / "common.yaml").write_text(common)
    (folder / "a.yaml").write_text("extends: common.yaml\nname: a\n")
    (folder / "z.yaml").write_text(f"extends: common.yaml\nname: z\n{TABLES}")
    return folder


@pytest.fixture
def recipe_folder() -> Path:
    return Path(__file__).parents[1] / "recipes"


def finish(task: StudyTask, folder: RunFolder) -> None:
    """Write what the predict and eval stages of a run write."""
    rows = [
        {"video": f"v{k // 2}", "expression_id": str(k), "subset": "single_target",
         "J": 50.0 + k + task.seed, "F": 60.0}
        for k in range(6)
    ]  # fmt: skip
    result = {"benchmark": "mevis", "root": "nowhere", "per_expression": rows}
    checkpoints = dict.fromkeys(("sft", "grpo-ktg"), result)
    (folder.root / "eval").mkdir(exist_ok=True)
    file = folder.root / "eval" / "mevis-valid_u.json"
    file.write_text(json.dumps({"checkpoints": checkpoints}))
    way = {"per_prompt": [1.0, 2.0], "components": {}}
    rewards = {"ktg": {c: {"sampled": way, "greedy": way} for c in checkpoints}}
    (folder.root / "predict").mkdir(exist_ok=True)
    (folder.root / "predict" / "rewards.json").write_text(json.dumps(rewards))


class Runner:
    """Runs stages as `rcot run` does, and is killed or fails as a test wants."""

    def __init__(self, dies: Callable[[StudyTask, str], None] = lambda task, stage: None) -> None:
        self.dies = dies
        self.done: Counter[tuple[str, str]] = Counter()

    def __call__(self, task: StudyTask) -> None:
        folder = RunFolder.claim(task.root, task.recipe)
        for stage in task.recipe.in_order(task.recipe.stages):
            if folder.is_done(stage):
                continue
            self.dies(task, stage)
            folder.new_attempt(stage)
            if stage == "eval":
                finish(task, folder)
            folder.mark_done(stage, minutes=1.0)
            self.done[task.label, stage] += 1


def study(tasks: list[StudyTask], out: Path, run: Runner) -> StudyOutcome:
    return run_study(tasks, tasks, out, lambda line: None, run)


def test_every_recipe_runs_with_every_seed_but_not_what_they_extend(
    recipes: Path, tmp_path: Path
) -> None:
    assert [path.name for path in recipes_in(recipes)] == ["a.yaml", "z.yaml"]
    out = tmp_path / "out"
    tasks = study_tasks(recipes, [2, 1], out)
    # recipes with rows of tables first: the others are compared with them
    assert [(t.name, t.seed) for t in tasks] == [("z", 2), ("a", 2), ("z", 1), ("a", 1)]
    assert [t.recipe.seed for t in tasks] == [2, 2, 1, 1]
    assert {t.recipe.data.store for t in tasks} == {str(out / "data")}
    assert len({t.root for t in tasks}) == 4
    only = study_tasks(recipes, [3], out, only=["a"], overrides=["grpo.n=4"])
    assert [(t.name, t.seed, t.recipe.grpo("grpo-ktg").n) for t in only] == [("a", 3, 4)]


def test_a_study_killed_at_random_points_resumes_and_repeats_nothing(
    recipes: Path, tmp_path: Path
) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    study(study_tasks(recipes, [1, 2], whole), whole, Runner())
    tasks = study_tasks(recipes, [1, 2], pieces)
    rng = random.Random(3)

    def dies(task: StudyTask, stage: str) -> None:
        if rng.random() < 0.2:
            raise KeyboardInterrupt

    runner, kills = Runner(dies), 0
    while True:
        try:
            outcome = study(tasks, pieces, runner)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 3 and not outcome.failures
    assert set(runner.done.values()) == {1} and len(runner.done) == 4 * 7
    one, other = (read_results(place).model_dump() for place in (whole, pieces))
    for run in (*one["runs"], *other["runs"]):
        run["command"] = run["command"].replace(str(whole), "OUT").replace(str(pieces), "OUT")
    assert one == other
    before = (pieces / "study.md").read_text()
    assert study(tasks, pieces, runner).page == pieces / "study.md"
    assert (pieces / "study.md").read_text() == before and len(runner.done) == 4 * 7


def test_a_failed_run_is_named_and_the_others_run(recipes: Path, tmp_path: Path) -> None:
    def dies(task: StudyTask, stage: str) -> None:
        if (task.name, stage) == ("z", "sft"):
            raise [StageFailed("sft: exit status 1", tmp_path / "log"), InputError("no rows"),
                   RuntimeError("two\nlines")][task.seed]  # fmt: skip

    tasks = study_tasks(recipes, [0, 1, 2], tmp_path / "out")
    outcome = run_study(tasks, tasks, tmp_path / "out", lambda line: None, Runner(dies))
    assert outcome.failures == {
        "z, seed 0": f"sft: exit status 1; full log: {tmp_path / 'log'}",
        "z, seed 1": "no rows",
        "z, seed 2": "RuntimeError: two; lines",
    }
    results = read_results(tmp_path / "out")
    assert [(run.recipe, run.seed) for run in results.runs] == [("a", 0), ("a", 1), ("a", 2)]


def test_a_finished_run_of_another_recipe_is_not_skipped(recipes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    study(study_tasks(recipes, [1], out), out, Runner())
    (recipes / "a.yaml").write_text("extends: common.yaml\nname: a\ngrpo: {n: 4}\n")
    outcome = study(study_tasks(recipes, [1], out), out, Runner())
    assert outcome.failures.keys() == {"a, seed 1"}
    assert "differs in: train.grpo-aks.n" in outcome.failures["a, seed 1"]
    assert {run.recipe for run in read_results(out).runs} == {"z"}


def rcot(*arguments: str) -> tuple[int, str]:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["study", *arguments])
    return result.exit_code, f"{result.exception} {result.output}"


def test_wrong_input_is_refused_before_anything_runs(recipes: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    for arguments, told in (
        ([str(tmp_path / "none"), *out], "no such folder of recipes"),
        ([str(recipes), "--only", "aa", *out], "--only: 'aa' is not one of a, z"),
        ([str(recipes), "--seeds", "1,x", *out], "--seeds: must be numbers"),
        ([str(recipes), "--seeds", "1,1", *out], "--seeds: names a seed twice"),
        ([str(recipes), "grpo.m=1", *out], "grpo.m: unknown key"),
        (["page", str(tmp_path)], "results.json"),
    ):
        status, output = rcot(*arguments)
        assert status != 0 and told in output, arguments
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_the_status_of_its_runs(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(task: StudyTask, stage: str) -> None:
        if task.name == "a":
            raise InputError("no rows")

    monkeypatch.setattr("rcot_rl.study_runs._run", Runner(dies))
    out = tmp_path / "out"
    status, output = rcot(str(recipes), "--seeds", "1", "--out", str(out))
    assert status == 1 and "a, seed 1 failed: no rows" in output and (out / "study.md").is_file()
    monkeypatch.setattr("rcot_rl.study_runs._run", Runner())
    status, output = rcot(str(recipes), "--seeds", "1", "--out", str(out))
    assert status == 0 and "z, seed 1: finished before" in output
    # seeds and recipes that are not named stay in the results
    status, _ = rcot(str(recipes), "--seeds", "2", "--only", "a", "--out", str(out))
    runs = {(run.recipe, run.seed) for run in read_results(out).runs}
    assert status == 0 and runs == {("z", 1), ("a", 1), ("a", 2)}
    (out / "study.md").unlink()
    assert rcot("page", str(out))[0] == 0 and (out / "study.md").is_file()
