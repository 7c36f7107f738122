"""Effects of a study: an independent derivation, and what they must not depend on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rcot_rl.monitoring.study.study_effects import ALL, Effect, Setting, Study, reward_changes
from rcot_rl.monitoring.study.study_page import study_page
from rcot_rl.monitoring.study.study_results import StudyResults

Values = Callable[..., dict[str, Any]]
REFERENCE = "SFT(A,G) + GRPO(A,G)"


def study_of(values: dict[str, Any]) -> Study:
    return Study(StudyResults.model_validate(values))


def effect(study: Study, row: str, column: str) -> Effect:
    setting, reference = study.setting("table-5", row), study.setting("table-5", REFERENCE)
    sample = study.sample(column)
    assert setting is not None and reference is not None and sample is not None
    result = study.effect(setting, reference, sample)
    assert result is not None
    return result


def test_an_effect_and_its_intervals_match_an_independent_derivation(study_values: Values) -> None:
    values = study_values()
    result = effect(study_of(values), "SFT(A,G)", "mevis")
    # [seeds, clips, expressions of a clip]; clips of equal size: a t interval over clip means
    difference = np.array(
        [
            np.array(cells["sft"]["J"]) + cells["sft"]["F"] - np.array(cells["last"]["J"])
            - cells["last"]["F"]
            for run in values["runs"]
            if run["recipe"] == "training"
            for cells in [run["scores"]["mevis-valid"]]
        ]
    ).reshape(3, 9, 4) / 2  # fmt: skip
    of_clips = difference.mean(axis=(0, 2))
    low, high = stats.t.interval(0.95, 8, of_clips.mean(), stats.sem(of_clips))
    assert result.over_clips[:3] == pytest.approx((of_clips.mean(), low, high))
    of_seeds = difference.mean(axis=(1, 2))
    paired = stats.ttest_1samp(of_seeds, 0).confidence_interval(0.95)
    assert result.per_seed == pytest.approx(list(of_seeds))
    assert result.over_seeds[:3] == pytest.approx((of_seeds.mean(), paired.low, paired.high))
    assert result.is_shown and result.mean < 0


def test_revos_is_the_mean_of_its_two_subsets_without_absent_targets(study_values: Values) -> None:
    values = study_values()
    of_subset = {s: effect(study_of(values), "base", f"revos/{s}").mean for s in
                 ("referring", "reasoning")}  # fmt: skip
    before = effect(study_of(values), "base", "revos").mean
    assert before == pytest.approx(np.mean(list(of_subset.values())))
    for run in values["runs"][:3]:  # scores of expressions without a target do not count
        run["scores"]["revos-valid"]["base"]["J"][2::3] = [100.0] * 12
    assert effect(study_of(values), "base", "revos").mean == pytest.approx(before)


def test_all_has_every_counted_expression_with_equal_weight(study_values: Values) -> None:
    study = study_of(study_values())
    counts = {c: len(study.sample(c).clusters) for c in ("revos", "mevis", ALL)}  # type: ignore[union-attr]
    assert counts == {"revos": 24, "mevis": 36, ALL: 60}


def test_order_of_seeds_and_recipes_changes_nothing(study_values: Values) -> None:
    values = study_values()
    turned = copy.deepcopy(values)
    turned["runs"] = [*turned["runs"][6:], *turned["runs"][2::-1], *turned["runs"][3:6]]
    for row in ("base", "SFT(A,G)"):
        for column in ("revos", "mevis", "revos/reasoning", ALL):
            one, other = (effect(study_of(v), row, column) for v in (values, turned))
            assert one.over_clips == pytest.approx(other.over_clips)
            assert one.over_seeds == pytest.approx(other.over_seeds)


def test_order_of_expressions_and_names_of_clips_change_nothing(study_values: Values) -> None:
    values = study_values()
    turned = copy.deepcopy(values)
    rng = np.random.default_rng(7)
    for name, one in turned["benchmarks"].items():
        n = len(one["clip"])
        order = [int(k) for k in rng.permutation(n)]
        renamed = [int(k) for k in rng.permutation(len(one["clips"]))]
        one["clip"] = [renamed[one["clip"][k]] for k in order]
        for field in ("id", "subset", "kind"):
            one[field] = [one[field][k] for k in order]
        for run in turned["runs"]:
            for cell in run["scores"][name].values():
                for field in ("J", "F", "empty", "found"):
                    if field in cell:
                        cell[field] = [cell[field][k] for k in order]
                for figure, given in cell.get("figures", {}).items():
                    cell["figures"][figure] = [given[k] for k in order]
    pages = [study_page(StudyResults.model_validate(v)) for v in (values, turned)]
    assert pages[0] == pages[1]


def test_only_seeds_that_both_settings_have_are_paired(study_values: Values) -> None:
    values = study_values()
    study = study_of(values)
    answer, full = (
        study.setting("table-15", "answer only"),
        study.setting("table-15", "explicit CoT"),
    )
    assert answer is not None and full is not None
    sample = study.sample(ALL)
    assert sample is not None
    fewer = Setting(answer.cell, {seed: answer.runs[seed] for seed in (1, 3)})
    both, pair = study.effect(answer, full, sample), study.effect(fewer, full, sample)
    assert both is not None and pair is not None
    assert pair.per_seed == [both.per_seed[0], both.per_seed[2]]
    assert study.effect(Setting("last", {4: answer.runs[1]}), full, sample) is None


def test_one_seed_shows_nothing_about_seeds(study_values: Values) -> None:
    one = effect(study_of(study_values(seeds=(1,))), "base", ALL)
    assert one.over_seeds.low is None and not one.is_shown
    three = effect(study_of(study_values()), "base", ALL)
    assert three.is_shown


def test_rewards_are_paired_over_prompts_and_over_seeds(study_values: Values) -> None:
    values = study_values()
    changes = reward_changes(study_of(values).runs_of("training"))
    assert [(c.task, c.way, c.what) for c in changes] == [
        ("ktg", way, what)
        for way in ("sampled", "greedy")
        for what in ("reward", "format", "accuracy")
    ]
    rewards = [run["rewards"]["ktg"] for run in values["runs"] if run["recipe"] == "training"]
    difference = np.array(
        [np.subtract(r["last"]["greedy"]["per_prompt"], r["sft"]["greedy"]["per_prompt"])
         for r in rewards]
    )  # fmt: skip
    (total,) = (c for c in changes if (c.way, c.what) == ("greedy", "reward"))
    of_prompts, of_seeds = difference.mean(axis=0), difference.mean(axis=1)
    assert total.over_prompts is not None
    assert total.over_prompts[1:3] == pytest.approx(
        stats.t.interval(0.95, 23, of_prompts.mean(), stats.sem(of_prompts))
    )
    assert total.over_seeds[1:3] == pytest.approx(
        stats.t.interval(0.95, 2, of_seeds.mean(), stats.sem(of_seeds))
    )
    assert total.after - total.before == pytest.approx(difference.mean())
