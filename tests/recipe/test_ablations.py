"""The ablation recipes: what they change, on the paper's models and on the laptop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rcot_rl.recipe.loader import RECIPES, load_recipe
from rcot_rl.recipe.schema import Recipe
from rcot_rl.stats.paper_tables import paper_tables

FOLDER = RECIPES.folder / "ablations"
PATHS = sorted(FOLDER.glob("*.yaml"))
PARTIAL = {"table-8", "table-9", "table-15"}
"""Tables of which one run gives only some rows."""


def changed(base: Any, other: Any, prefix: str = "") -> set[str]:
    """Return the dotted keys whose values differ, at the deepest mapping that both have."""
    if not isinstance(base, dict) or not isinstance(other, dict):
        return set() if base == other else {prefix}
    return {
        key
        for name in base.keys() | other.keys()
        for key in changed(base.get(name), other.get(name), f"{prefix}.{name}".lstrip("."))
    }


def of(name: str, *overrides: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml", overrides)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_ablations_resolve_on_both_bases_and_cover_their_tables(path: Path) -> None:
    for overrides in ([], ["extends=laptop"]):
        recipe = load_recipe(path, overrides)
        assert recipe.name == path.stem.replace("_", "-")
        assert recipe.device == ("cpu" if overrides else "cuda")
        assert recipe.report.paper_tables
        for name, rows in recipe.report.paper_tables.items():
            if name not in PARTIAL:
                assert list(rows) == list(paper_tables()[name].rows)
            # two rows of one checkpoint would be one result twice, except for other metrics
            if not paper_tables()[name].metrics:
                assert len(set(rows.values())) == len(rows)


@pytest.mark.parametrize("base", ["3b", "laptop"])
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("table3", {"predict.variants", "eval.checkpoints"}),
        ("table4", {"predict.variants", "eval.checkpoints"}),
        ("table10", {"predict.variants", "eval.checkpoints"}),
        ("inference", {"predict.variants", "eval.checkpoints"}),
        ("table5", {"train", "stages", "eval.checkpoints"}),
        ("table6", {"train", "stages", "predict.variants", "eval.checkpoints"}),
        ("table8_3b", set()),
        ("table15", {"data.response", "train.grpo-aks.reward", "train.grpo-ktg.reward"}),
    ],
)
def test_an_ablation_changes_only_what_it_names(name: str, keys: set[str], base: str) -> None:
    overrides = ["extends=laptop"] if base == "laptop" else []
    usual = load_recipe("laptop" if overrides else "rcot_seg_3b").model_dump(mode="json")
    ablation = of(name, *overrides).model_dump(mode="json")
    differs = {k for k in changed(usual, ablation) if not k.startswith("report.")} - {"name"}
    added = {k for k in differs if k.startswith("train.") and k.count(".") == 1}
    shallow = {"predict.variants" if k.startswith("predict.variants") else k for k in differs}
    assert shallow - added | ({"train"} if added else set()) == keys
    if added:
        assert not {k.partition(".")[2] for k in added} & set(usual["train"]), (
            "stages are only added"
        )


@pytest.mark.parametrize("overrides", [[], ["extends=laptop"]], ids=["3b", "laptop"])
def test_the_chains_of_table_5_are_those_of_the_paper(overrides: list[str]) -> None:
    recipe = of("table5", *overrides)

    def chain(stage: str) -> list[str]:
        names = [stage]
        while names[-1] != "base":
            names.append(recipe.start_of(names[-1]))
        return [
            f"SFT({recipe.sft(s).tasks or 'both'})"
            if s in recipe.sft_stages
            else recipe.grpo(s).reward
            for s in reversed(names[:-1])
        ]

    rows = recipe.report.paper_tables["table-5"]
    assert {row: chain(stage) for row, stage in rows.items()} == {
        "base": [],
        "SFT(A,G)": ["SFT(both)"],
        "GRPO(A,G)": ["aks", "ktg"],
        "SFT(A,G) + GRPO(G)": ["SFT(both)", "ktg"],
        "SFT(G) + GRPO(A,G)": ["SFT(['ktg'])", "aks", "ktg"],
        "SFT(A,G) + GRPO(A,G)": ["SFT(both)", "aks", "ktg"],
    }
    # the KL reference is the model before GRPO (3.4)
    for stage in recipe.grpo_stages:
        before = stage
        while before in recipe.grpo_stages:
            before = recipe.start_of(before)
        assert recipe.reference_of(stage) == before
    steps = {recipe.grpo(s).reward: set() for s in recipe.grpo_stages}
    for stage in recipe.grpo_stages.values():
        steps[stage.reward].add((stage.steps, stage.shard_set, stage.learning_rate))
    assert all(len(settings) == 1 for settings in steps.values()), "all chains train alike"


def test_the_variants_of_inference_have_the_tables_values() -> None:
    recipe = of("inference")
    names = {
        row: name.partition("@")[2] for row, name in recipe.report.paper_tables["table-4"].items()
    }
    for row, name in names.items():
        variant = recipe.predict.variants[name] if name else {"rounds": recipe.predict.rounds}
        assert variant == {"rounds": int(row.removeprefix("λ="))}
    parts = {"VDG": "vdg", "KFG": "kfg"}
    for row, name in recipe.report.paper_tables["table-3"].items():
        values = recipe.predict.variants.get(name.partition("@")[2], {})
        for part, key in parts.items():
            assert values.get(key, True) == (part in row), row
        assert (values.get("rounds", 5) > 0) == ("AKS" in row)
    assert recipe.predict.variants["frames-16"] == {"reevaluate_frames": 16}
    for single in ("table3", "table4", "table10"):
        variants = of(single).predict.variants
        assert all(v in recipe.predict.variants.values() for v in variants.values())


def test_the_separated_architecture_has_a_model_for_each_trained_task() -> None:
    recipe = of("table6")
    models = recipe.predict.variants["separated"]["models"]
    assert (models["vdg"], models["kfg"]) == ("base", "base")
    for task in ("aks", "ktg"):
        stage = models[task]
        before = recipe.start_of(stage)
        assert recipe.grpo(stage).reward == task
        assert recipe.sft(before).tasks == [task] and recipe.start_of(before) == "base"
