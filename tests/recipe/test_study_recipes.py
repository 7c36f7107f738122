"""The recipes of the study: what they share, what they change, and that they cover the tables."""

from __future__ import annotations

from typing import Any

import pytest

from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import RECIPES, load_recipe
from rcot_rl.recipe.schema import Recipe
from rcot_rl.stats.paper_tables import paper_tables
from rcot_rl.study_runs import recipes_in

FOLDER = RECIPES.folder / "study"
TABLES = (
    "table-3",
    "table-4",
    "table-5",
    "table-6",
    "table-10",
    "table-13",
    "table-14",
    "table-15",
)


def of(name: str, *overrides: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml", overrides)


def test_the_study_has_four_runs_that_cover_the_tables() -> None:
    names = [path.stem for path in recipes_in(FOLDER)]
    assert names == ["answer_only", "separated", "training", "zero_target"]
    rows: dict[str, list[str]] = {}
    for name in names:
        for table, of_table in of(name).report.paper_tables.items():
            rows.setdefault(table, []).extend(of_table)
    assert {t: sorted(r) for t, r in rows.items()} == {
        table: sorted(paper_tables()[table].rows) for table in TABLES
    }, "every row once"
    references = {paper_tables()[table].reference for table in TABLES} - {None}
    of_training = {row for r in of("training").report.paper_tables.values() for row in r}
    assert references <= of_training, "one run has all references"


@pytest.mark.parametrize("name", ["training", "answer_only", "separated", "zero_target"])
def test_all_runs_are_scored_on_the_same_five_benchmarks(name: str) -> None:
    common, recipe = of("common"), of(name)
    assert recipe.toy == common.toy and recipe.eval.benchmarks == common.eval.benchmarks
    assert len({b.dataset for b in recipe.eval.benchmarks}) == 5
    assert recipe.data.seed is not None, "all seeds share the data"
    for stage, settings in recipe.grpo_stages.items():
        task = "ktg" if "ktg" in settings.reward else "aks"
        like = common.grpo(f"grpo-{task}")
        same: dict[str, Any] = {"after": None, "reference": None, "reward": like.reward}
        if stage in ("ktg-only", "ktg-alone"):  # no AKS rows, by the paper's Tables 5 and 6
            same["rehearse"] = like.rehearse
        assert settings.model_copy(update=same) == like, f"{stage} trains as long as the others"


def test_the_chains_are_those_of_the_ablations() -> None:
    for name, ablation in (("training", "table5"), ("separated", "table6")):
        recipe = of(name)
        other = load_recipe(RECIPES.folder / "ablations" / f"{ablation}.yaml", ["extends=laptop"])
        for stage in set(recipe.stages) & set(recipe.train):
            assert recipe.start_of(stage) == other.start_of(stage)
            assert recipe.reference_of(stage) == other.reference_of(stage)
    separated = of("separated")
    models = separated.predict.models
    assert (models["vdg"], models["kfg"], models["aks"]) == ("base", "base", "aks-alone")
    assert separated.scored_checkpoints == ["ktg-alone"]
    unused = set(separated.train) - set(separated.stages)
    assert unused == {"sft", "grpo-aks", "grpo-ktg"}, "the unified chain is that of training"


def test_the_variants_are_those_of_the_ablations_except_the_number_of_frames() -> None:
    ours, theirs = of("training").predict.variants, dict(
        load_recipe(RECIPES.folder / "ablations" / "inference.yaml").predict.variants
    )  # fmt: skip
    frames = theirs.pop("frames-16")
    assert frames.keys() == ours["light"].keys()
    assert {**theirs, "light": ours["light"]} == ours


def test_only_the_named_checkpoints_predict_with_variants() -> None:
    recipe = of("training")
    predictions = {c: list(recipe.predictions_of(c)) for c in recipe.scored_checkpoints}
    assert sum(map(len, predictions.values())) == 6 + len(recipe.predict.variants)
    assert predictions["sft"] == ["sft"]
    assert predictions["grpo-ktg"][1:] == [f"grpo-ktg@{v}" for v in recipe.predict.variants]
    everywhere = of("training", "eval.variant_checkpoints=null")
    assert len(everywhere.predictions_of("sft")) == 1 + len(recipe.predict.variants)
    with pytest.raises(InputError) as caught:
        of("training", "eval.variant_checkpoints=[grpo-kgt]", "report.paper_tables={}")
    assert "eval.variant_checkpoints: 'grpo-kgt' is not scored" in str(caught.value)
    assert "did you mean grpo-ktg?" in str(caught.value)


def test_zero_target_training_changes_rows_reward_and_prompt_only() -> None:
    on, off = of("zero_target"), of("training")
    assert on.data.zero_target_share > 0 == off.data.zero_target_share
    assert on.predict.zero_target and not off.predict.zero_target
    assert on.grpo("grpo-ktg").reward == "ktg-zero-target"
    assert on.grpo("grpo-aks") == off.grpo("grpo-aks") and on.sft("sft") == off.sft("sft")
    assert on.toy is not None
    assert {c.layout for c in on.toy.corpora if c.absent_share} == {"revos"}, (
        "J&F of ReVOS leaves expressions without a target out; that of MeViS counts them"
    )
