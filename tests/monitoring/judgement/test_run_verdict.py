"""The verdict finds what was planted, says unknown without data, and is rarely wrong by chance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.monitoring.judgement.changes import direction
from rcot_rl.monitoring.judgement.run_verdict import judge_run
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.stats.expression_scores import paired_change, pooled_expressions
from rcot_rl.stats.intervals import paired_difference
from rcot_rl.stats.trend import trend

RUNS = ["seed1", "seed2", "seed3", "make-run"]
FALSE_ALARMS = 0.05
"""Largest share of statements "rose" where nothing changed; in theory 0.025."""


def stage_of(verdict, name: str):
    return next(stage for stage in verdict.stages if stage.stage == name)


def text_of(verdict) -> str:
    sentences = [s for stage in verdict.stages for s in stage.sentences]
    return " ".join([verdict.headline, *sentences, *verdict.next_steps])


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("name", RUNS)
def test_shipped_runs_are_judged_by_their_numbers(name, shipped_run) -> None:
    reader = shipped_run(name)
    verdict = judge_run(reader)
    assert [stage.stage for stage in verdict.stages] == ["sft", "grpo-aks", "grpo-ktg"]
    assert verdict.level in ("good", "mixed")
    assert "the reward rose in grpo-aks" in verdict.headline.lower()
    for stage, task, start in (("grpo-aks", "aks", "sft"), ("grpo-ktg", "ktg", "grpo-aks")):
        facts = stage_of(verdict, stage).facts
        sampled = [reader.heldout()[task][c]["sampled"] for c in (start, stage)]
        held_out = facts["heldout"][task]["sampled"]
        change = sampled[1]["mean"] - sampled[0]["mean"]
        assert held_out["change"] == pytest.approx(change)
        assert held_out["low"] > 0
        weight = {"format": 1.0, "accuracy": 2.0 if task == "aks" else 1.0}
        parts = {
            c: weight[c] * (sampled[1]["components"][c] - sampled[0]["components"][c])
            for c in weight
        }
        assert held_out["components"] == pytest.approx(parts)
        share = facts["heldout"][task]["form_share"]
        assert share == pytest.approx(parts["format"] / change, rel=0.02)
        assert facts.get("form_alone") is not True
        assert facts["alerts"] == []
    lines = reader.metrics("grpo-ktg")
    thirds = [np.mean([x["reward/mean"] for x in part]) for part in (lines[:16], lines[-16:])]
    ktg = stage_of(verdict, "grpo-ktg").facts["sampled"]
    assert [ktg["before"], ktg["after"]] == pytest.approx(thirds)


def test_the_share_of_format_is_said_in_words(shipped_run) -> None:
    """The third seed's held-out KTG reward rises by 0.71, of which 0.46 is format."""
    verdict = judge_run(shipped_run("seed3"))
    words = " ".join(stage_of(verdict, "grpo-ktg").sentences)
    assert "sampled 3.16 to 3.87, +0.71 [+0.58, +0.84]" in words
    assert "Of this rise: +0.46 from format, +0.25 from accuracy." in words
    assert "65 % of it format" in verdict.headline
    assert any("components.format.weight" in step for step in verdict.next_steps)


@pytest.mark.parametrize("name", RUNS)
def test_shuffled_steps_rarely_rise(name, shipped_run) -> None:
    """Null: the order of the steps is random."""
    random, rose, falls, n = np.random.default_rng(1), 0, 0, 0
    reader = shipped_run(name)
    for stage in ("grpo-aks", "grpo-ktg"):
        rewards = np.array([line["reward/mean"] for line in reader.metrics(stage)])
        for _ in range(1000):
            way = direction(trend(random.permutation(rewards)).change)
            rose, falls, n = rose + (way == "rose"), falls + (way == "fell"), n + 1
    print(f"{name}: rose {rose / n:.4f}, fell {falls / n:.4f} of {n}")
    assert max(rose, falls) / n <= FALSE_ALARMS


@pytest.mark.parametrize("way", ["sampled", "greedy"])
def test_swapped_checkpoints_rarely_agree(way, shipped_run) -> None:
    """Null: for each prompt, which checkpoint comes first is random."""
    random, rose, n = np.random.default_rng(2), 0, 0
    heldout = shipped_run("seed1").heldout()
    for task, start, stage in (("aks", "sft", "grpo-aks"), ("ktg", "grpo-aks", "grpo-ktg")):
        pair = [np.array(heldout[task][c][way]["per_prompt"]) for c in (start, stage)]
        for _ in range(1000):
            swap = random.integers(2, size=len(pair[0])).astype(bool)
            before, after = np.where(swap, pair[1], pair[0]), np.where(swap, pair[0], pair[1])
            rose, n = rose + (direction(paired_difference(before, after)) == "rose"), n + 1
    print(f"{way}: agrees {rose / n:.4f} of {n}")
    assert rose / n <= FALSE_ALARMS


def test_masks_of_swapped_clips_rarely_follow(shipped_run) -> None:
    """Null: for each clip, which checkpoint comes first is random."""
    random, rose, n = np.random.default_rng(3), 0, 0
    scores = shipped_run("seed1").scores()
    first, last = (pooled_expressions(scores, c) for c in ("grpo-aks", "grpo-ktg"))
    clips = sorted({key.video for key in first})
    for _ in range(1000):
        swap = dict(zip(clips, random.integers(2, size=len(clips)), strict=True))
        before = {k: (last if swap[k.video] else first)[k] for k in first}
        after = {k: (first if swap[k.video] else last)[k] for k in first}
        rose, n = rose + (direction(paired_change(before, after)) == "rose"), n + 1
    print(f"masks follow {rose / n:.4f} of {n}")
    assert rose / n <= FALSE_ALARMS


@pytest.mark.parametrize(
    ("checkpoint", "words", "level"),
    [("grpo-ktg", "masks follow", "good"), ("sft", "masks got worse", "bad")],
)
def test_a_planted_change_of_masks_is_found(checkpoint, words, level, shipped_run) -> None:
    """25 points of J&F more for each of 120 expressions, after the chain or before it."""
    reader = shipped_run("seed2")

    def raised(scores: Any) -> Any:
        for row in scores["checkpoints"][checkpoint]["per_expression"]:
            row["J&F"] += 25.0
        return scores

    for path in (reader.root / "eval").glob("*.json"):
        edit(path, raised)
    verdict = judge_run(reader)
    assert words in verdict.headline
    assert verdict.level == level


def test_masks_that_do_not_follow_name_the_steps_before_them(shipped_run) -> None:
    reader = shipped_run("seed2")

    def with_figures(scores: Any) -> Any:
        before, after = (scores["checkpoints"][c] for c in ("grpo-aks", "grpo-ktg"))
        before |= {"box_iou": 30.0, "keyframe_area_ratio": 80.0}
        after |= {"box_iou": 40.0, "per_expression": before["per_expression"]}
        return scores

    for path in (reader.root / "eval").glob("*.json"):
        edit(path, with_figures)
    verdict = judge_run(reader)
    ktg = stage_of(verdict, "grpo-ktg")
    assert ktg.facts["masks"]["direction"] == "unclear"
    assert "Before the masks: box IoU 30.0 % to 40.0 %." in ktg.sentences
    assert any("Masks do not follow" in step for step in verdict.next_steps)


def test_rewards_on_other_prompts_are_not_compared(shipped_run) -> None:
    reader = shipped_run("seed1")

    def other_prompts(rewards: Any) -> Any:
        rewards["ktg"]["grpo-ktg"]["prompts"][0] = "another"
        return rewards

    edit(reader.root / "predict" / "rewards.json", other_prompts)
    ktg = stage_of(judge_run(reader), "grpo-ktg")
    assert "sampled" not in ktg.facts["heldout"]["ktg"]
    assert any("held-out reward is unknown" in sentence for sentence in ktg.sentences)


def test_a_hack_of_the_format_is_bad(rollout_steps, make_stage) -> None:
    mixtures = []
    for k in range(60):
        hacked = min(1.0, k / 20)
        shares = {"right": 0.22, "wrong": 0.38, "malformed": 0.4}
        mixtures.append({n: s * (1 - hacked) for n, s in shares.items()} | {"hack": hacked})
    verdict = judge_run(make_stage(rollout_steps(mixtures)))
    assert verdict.level == "bad"
    assert "through format alone" in text_of(verdict)
    assert "format_only" in stage_of(verdict, "grpo-ktg").facts["alerts"]
    assert any("components.format.weight" in step for step in verdict.next_steps)


def test_a_reward_without_other_weights_gets_the_advice_to_add_one(
    honest_steps, make_stage
) -> None:
    lines = honest_steps(200)
    for line in lines:
        line["reward/mean"] = line["reward/format/mean"]
    reader = make_stage(lines, settings=["train.grpo-ktg.reward=ktg-format-only"])
    verdict = judge_run(reader)
    assert verdict.level == "bad"
    assert "pays for nothing but form" in verdict.next_steps[0]


def test_a_hack_that_only_held_out_rewards_show_is_bad(shipped_run) -> None:
    reader = shipped_run("seed1")

    def flat_accuracy(rewards: Any) -> Any:
        before, after = (rewards["ktg"][c]["sampled"] for c in ("grpo-aks", "grpo-ktg"))
        after["components"]["accuracy"] = before["components"]["accuracy"]
        return rewards

    edit(reader.root / "predict" / "rewards.json", flat_accuracy)
    verdict = judge_run(reader)
    assert verdict.level == "bad"
    assert "through format alone" in verdict.headline


def test_a_collapse_is_bad(honest_steps, make_stage) -> None:
    lines = [
        line | ({"reward/mean": 0.8} if line["step"] > 40 else {}) for line in honest_steps(60)
    ]
    verdict = judge_run(make_stage(lines))
    assert verdict.level == "bad"
    assert "The sampled reward fell" in text_of(verdict)
    assert "Alert at step 4" in text_of(verdict)
    assert any("learning_rate" in step for step in verdict.next_steps)


def test_held_out_rewards_that_disagree_are_bad(shipped_run) -> None:
    reader = shipped_run("seed2")

    def exchanged(rewards: Any) -> Any:
        ktg = rewards["ktg"]
        ktg["grpo-aks"], ktg["grpo-ktg"] = ktg["grpo-ktg"], ktg["grpo-aks"]
        return rewards

    edit(reader.root / "predict" / "rewards.json", exchanged)
    verdict = judge_run(reader)
    assert verdict.level == "bad"
    assert "Held-out reward (KTG) disagrees" in text_of(verdict)
    assert "the reward fell in grpo-ktg" in verdict.headline.lower()


def test_a_task_that_is_forgotten_makes_a_run_mixed(shipped_run) -> None:
    reader = shipped_run("seed3")

    def forget(rewards: Any) -> Any:
        aks = rewards["aks"]
        for way in ("sampled", "greedy"):
            aks["grpo-ktg"][way] = aks["sft"][way]
        return rewards

    edit(reader.root / "predict" / "rewards.json", forget)
    verdict = judge_run(reader)
    assert verdict.level == "mixed"
    assert "The other task suffers: held-out AKS" in text_of(verdict)
    assert any("kl_loss_coef" in step for step in verdict.next_steps)


def test_restarts_are_listed_with_their_causes(honest_steps, make_stage, fail_twice) -> None:
    reader = make_stage(honest_steps(40))
    stage = reader.root / "grpo-ktg"
    fail_twice(stage)
    for attempt in (2, 3, 4):  # the last one after Ctrl-C
        (stage / f"attempt-{attempt}").mkdir()
    verdict = judge_run(reader)
    words = " ".join(stage_of(verdict, "grpo-ktg").sentences)
    assert "2 failed attempts: a hang, an error; after step 7, 12." in words
    assert "Interrupted and resumed 1 time." in words
    assert any("stall_timeout_s" in step for step in verdict.next_steps)


def test_sft_that_overfits_is_named(make_stage) -> None:
    random = np.random.default_rng(1)
    lines = [
        {"step": k, "train/loss": 2 * np.exp(-k / 20) + random.normal(0, 0.02)}
        | ({"val/loss": 0.5 + 0.3 * abs(k - 30) / 30} if k % 10 == 0 else {})
        for k in range(1, 61)
    ]
    verdict = judge_run(make_stage(lines, "sft"))
    assert verdict.level == "unknown"
    assert "The SFT loss went from" in verdict.headline
    words = " ".join(stage_of(verdict, "sft").sentences)
    assert "The training loss fell" in words
    assert "overfits" in words
    assert "rose from 0.700 to 0.800" in words


def test_the_weights_of_a_users_function_are_found(honest_steps, make_stage) -> None:
    lines = honest_steps(48)
    for line in lines:
        form, accuracy = line["reward/format/mean"], line["reward/accuracy/mean"]
        line["reward/mean"] = 0.5 * form + 2 * accuracy
    verdict = judge_run(make_stage(lines, "grpo-ktg", ["train.grpo-ktg.reward=mine.py:f"]))
    parts = stage_of(verdict, "grpo-ktg").facts["sampled"]["components"]
    for name, weight in (("format", 0.5), ("accuracy", 2.0)):
        values = [line[f"reward/{name}/mean"] for line in lines]
        change = np.mean(values[-16:]) - np.mean(values[:16])
        assert parts[name] == pytest.approx(weight * change)


def test_missing_data_are_unknown(tmp_path, make_stage, honest_steps) -> None:
    nothing = judge_run(RunReader(tmp_path / "nothing"))
    assert (nothing.level, nothing.stages, nothing.next_steps) == ("unknown", [], [])
    assert "Nothing to judge yet" in nothing.headline
    few = judge_run(make_stage(honest_steps(5)))
    assert few.level == "unknown"
    assert "too few steps" in few.headline.lower()
    some = judge_run(make_stage(honest_steps(200)))
    words = " ".join(stage_of(some, "grpo-ktg").sentences)
    assert "held-out reward is unknown" in words
    assert "Whether masks follow is unknown" in words
    assert some.level == "good"


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["aks", "ktg", "sft", "grpo-aks", "grpo-ktg", "sampled", "mean"])
            | st.sampled_from(["per_prompt", "components", "checkpoints", "per_expression", "J&F"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(_JSON, _JSON)
@settings(max_examples=50, deadline=None)
def test_no_file_stops_the_verdict(tmp_path_factory, heldout, scores) -> None:
    run = tmp_path_factory.mktemp("run")
    for path, value in (("predict/rewards.json", heldout), ("eval/revos-valid.json", scores)):
        (run / path).parent.mkdir()
        (run / path).write_text(json.dumps(value))
    (run / "grpo-ktg").mkdir()
    lines = [json.dumps({"step": k, "reward/mean": 1.0, "reward/x/mean": 1}) for k in range(12)]
    (run / "grpo-ktg" / "metrics.jsonl").write_text("\n".join([*lines, "[1]", ""]))
    assert judge_run(RunReader(run)).headline
