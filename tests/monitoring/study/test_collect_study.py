"""Collecting a study from run folders: numbers as the runs have them, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from rcot_rl.errors import InputError
from rcot_rl.monitoring.study.collect_study import FinishedRun, collect
from rcot_rl.recipe.loader import load_recipe

FILES = ("eval/reasonvos-valid.json", "predict/rewards.json", "recipe.yaml")


@pytest.fixture
def finished(make_run: Callable[..., Path], tmp_path: Path) -> FinishedRun:
    run = make_run(prompts=12)
    benchmark = f"eval.benchmarks=[{{dataset: reasonvos, root: {tmp_path / 'corpus'}}}]"
    rows = "{table-14: {average IoU: grpo-ktg}}"
    recipe = load_recipe("laptop", [benchmark, f"report.paper_tables={rows}"])
    record = yaml.safe_load((run / "recipe.yaml").read_text())
    record["recipe"] = recipe.model_dump(mode="json")
    (run / "recipe.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
    file = run / FILES[1]
    rewards = json.loads(file.read_text())
    for checkpoints in rewards.values():
        for ways in checkpoints.values():
            for way in ("sampled", "greedy"):
                ways[way]["components"] = {"format": 0.75}
    file.write_text(json.dumps(rewards))
    return FinishedRun("one", 3, run, ("rcot", "run", "one.yaml", "x=[a b]"))


def test_results_have_the_numbers_of_the_run(finished: FinishedRun) -> None:
    results = collect([finished])
    (run,) = results.runs
    scored = json.loads((finished.root / FILES[0]).read_text())["checkpoints"]
    rewards = json.loads((finished.root / FILES[1]).read_text())
    assert run.scores["reasonvos-valid"].keys() == scored.keys()
    for name, cell in run.scores["reasonvos-valid"].items():
        mean = (np.mean(cell.J) + np.mean(cell.F)) / 2
        assert mean == pytest.approx(scored[name]["J&F"], abs=0.005)
    figures = run.scores["reasonvos-valid"]["grpo-ktg"].figures
    assert np.mean(figures["box_iou"]) == pytest.approx(scored["grpo-ktg"]["box_iou"], abs=0.005)  # type: ignore[arg-type]
    assert not run.scores["reasonvos-valid"]["sft"].figures, "no table asks for them"
    greedy = run.rewards["aks"]["sft"]["greedy"]
    assert np.mean(greedy.per_prompt) == pytest.approx(
        rewards["aks"]["sft"]["greedy"]["mean"], abs=1e-4
    )
    assert greedy.components == {"format": 0.75}
    assert (run.start, run.final, run.seed) == ("sft", "grpo-ktg", 3)
    assert run.minutes == {"data": 0.7, "sft": 2.1, "grpo-aks": 4.5}
    assert run.command == "rcot run one.yaml 'x=[a b]'" and run.commit == "feedc0ffee"
    benchmark = results.benchmarks["reasonvos-valid"]
    assert benchmark.clips == [f"clip-{k:02d}" for k in range(5)] and set(benchmark.kind) == {""}


def test_kinds_come_from_the_toy_corpus(finished: FinishedRun, tmp_path: Path) -> None:
    videos = {"clip-01": {"expressions": {"0": {"kind": "time"}}}, "clip-02": 5}
    (tmp_path / "corpus" / "toy.json").write_text(json.dumps({"videos": videos}))
    kinds = collect([finished]).benchmarks["reasonvos-valid"].kind
    assert kinds == ["", "time", "", "", ""]


@pytest.mark.parametrize("name", FILES)
def test_a_run_without_one_of_its_files_is_refused(finished: FinishedRun, name: str) -> None:
    (finished.root / name).unlink()
    with pytest.raises(InputError) as caught:
        collect([finished])
    assert str(caught.value).startswith(f"{finished.root / name}: ")


@pytest.mark.parametrize(
    ("path", "new", "told"),
    [
        (("sft", "per_expression", 1, "J"), None, "sft.per_expression.clip-01/0.J: must be a numb"),
        (("sft", "per_expression", 1, "J"), 250.0, "sft.J.1: "),
        (("sft", "per_expression", 1, "video"), "x", "sft: has other expressions than grpo-ktg"),
        (("sft", "per_expression"), {}, "sft.per_expression: must be a list of objects"),
        (("sft",), {}, "sft.per_expression: missing"),
    ],
)
def test_broken_scores_are_refused(
    finished: FinishedRun, path: tuple[str | int, ...], new: object, told: str
) -> None:
    file = finished.root / FILES[0]
    document = json.loads(file.read_text())
    value = document["checkpoints"]
    for step in path[:-1]:
        value = value[step]
    value[path[-1]] = new
    file.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        collect([finished])
    (line,) = caught.value.faults
    assert line.startswith(str(finished.root)) and told in line


def test_runs_with_other_expressions_are_refused(finished: FinishedRun, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished.root, other)
    file = other / FILES[0]
    document = json.loads(file.read_text())
    for result in document["checkpoints"].values():
        result["per_expression"].pop()
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match="has other expressions than the runs before it"):
        collect([finished, finished._replace(seed=4, root=other)])
