"""Planted faults raise their alert within a stated number of steps; honest runs raise none."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.monitoring.judgement.alert_rules import RULES, AlertWatch, alerts_of
from rcot_rl.monitoring.run_files.run_reader import RunReader

SEEDS = range(10)


def codes(alerts) -> list[str]:
    return [alert.code for alert in alerts]


def first_step(alerts, code: str) -> int | None:
    return next((alert.step for alert in alerts if alert.code == code), None)


def changed(lines: list[dict], start: int, **values) -> list[dict]:
    """Return the lines with other values from `start` on; a function gets the step and the line."""
    names = {key: key.replace("__", "/") for key in values}
    return [
        line
        if line["step"] < start
        else line
        | {
            names[key]: value(line["step"], line) if callable(value) else value
            for key, value in values.items()
        }
        for line in lines
    ]


@pytest.mark.parametrize("name", ["seed1", "seed2", "seed3", "make-run"])
def test_shipped_runs_raise_no_alert(name, shipped_run) -> None:
    reader = shipped_run(name)
    assert {stage: codes(alerts_of(reader, stage)) for stage in reader.training_stages} == {
        "sft": [],
        "grpo-aks": [],
        "grpo-ktg": [],
    }


@pytest.mark.parametrize("stage", ["grpo-aks", "grpo-ktg"])
def test_shuffled_steps_of_a_shipped_run_raise_no_alert(stage, shipped_run, make_stage) -> None:
    """100 orders of honest steps, and 2,000 steps drawn from them."""
    lines = shipped_run("seed1").metrics(stage)
    random = np.random.default_rng(5)
    for _ in range(100):
        order = random.permutation(len(lines))
        shuffled = [lines[k] | {"step": n} for n, k in enumerate(order, 1)]
        assert codes(alerts_of(make_stage(shuffled, stage), stage)) == []
    drawn = random.integers(len(lines), size=2000)
    long = [lines[k] | {"step": n} for n, k in enumerate(drawn, 1)]
    assert codes(alerts_of(make_stage(long, stage), stage)) == []


@pytest.mark.parametrize("n", [10, 48, 1000])
def test_honest_stages_of_any_length_raise_no_alert(n, honest_steps, make_stage) -> None:
    for seed in range(3 if n == 1000 else 20):
        assert codes(alerts_of(make_stage(honest_steps(n, seed)), "grpo-ktg")) == []


@pytest.mark.parametrize(
    ("code", "values", "within"),
    [
        ("reward_collapse", {"reward__mean": lambda _, line: line["reward/mean"] - 1.8}, 4),
        ("reward_collapse", {"reward__mean": lambda step, line: 0.85 ** (step - 30) * 4}, 7),
        ("kl_runaway", {"actor__kl_loss": lambda step, _: 0.02 * 1.4 ** (step - 30)}, 9),
        ("kl_runaway", {"actor__kl_loss": 0.7}, 3),
        ("kl_runaway", {"actor__kl_loss": float("nan")}, 3),
        ("zero_variance", {"group__zero_variance_fraction": 0.9}, 3),
        ("parse_failures", {"reason__json_invalid": 0.6}, 3),
        ("parse_failures", {"reason__answer_missing": 0.35}, 3),
        (
            "truncation",
            {"response_length__clip_ratio": 0.3, "response_length__max": 160.0},
            3,
        ),
        ("disk", {"disk__free_gib": 0.4}, 1),
    ],
)
def test_a_planted_fault_raises_only_its_alert(
    code, values, within, honest_steps, make_stage
) -> None:
    for seed in SEEDS:
        lines = changed(honest_steps(60, seed), 30, **values)
        alerts = alerts_of(make_stage(lines), "grpo-ktg")
        assert codes(alerts) == [code], seed
        assert 30 <= alerts[0].step < 30 + within, seed


@pytest.mark.parametrize(
    ("code", "values"),
    [
        ("reward_collapse", {"reward__mean": 0.0}),
        ("kl_runaway", {"actor__kl_loss": 3.0}),
        ("zero_variance", {"group__zero_variance_fraction": 1.0}),
        ("parse_failures", {"reason__json_invalid": 1.0}),
    ],
)
def test_two_odd_steps_raise_nothing(code, values, honest_steps, make_stage) -> None:
    lines = honest_steps(60)
    lines[30:32] = changed(lines[30:32], 0, **values)
    assert alerts_of(make_stage(lines), "grpo-ktg") == []


def test_an_alert_is_raised_again_only_after_it_cleared(honest_steps, make_stage) -> None:
    def with_share(*stretches: tuple[int, int, float]):
        lines = honest_steps(60)
        for start, end, share in stretches:
            part = changed(lines[start:end], 0, group__zero_variance_fraction=share)
            lines[start:end] = part
        return [a.step for a in alerts_of(make_stage(lines), "grpo-ktg")]

    # 0.7 is below the bound of 0.8, but does not clear the alert
    assert with_share((20, 30, 0.9), (30, 40, 0.7), (40, 50, 0.9)) == [23]
    assert with_share((20, 30, 0.9), (30, 40, 0.3), (40, 50, 0.9)) == [23, 43]


def test_responses_of_equal_length_are_not_cut(honest_steps, make_stage) -> None:
    """verl's clip_ratio is the share of the step's longest response, also of a short one."""
    lines = changed(honest_steps(40), 1, response_length__clip_ratio=1.0, response_length__max=20.0)
    assert alerts_of(make_stage(lines), "grpo-ktg") == []


@pytest.mark.parametrize(
    ("hacked_right", "within"), [(0.0, 15), (0.22, 30)], ids=["accuracy falls", "accuracy flat"]
)
def test_a_hack_of_the_format_is_found(hacked_right, within, rollout_steps, make_stage) -> None:
    """Responses that game the format replace the malformed ones, and at first all others."""
    for seed in range(5):
        mixtures = []
        for k in range(120):
            hacked = min(1.0, k / 20)
            before = {"right": 0.22, "wrong": 0.38, "malformed": 0.4, "hack": 0.0}
            after = {"right": hacked_right, "wrong": 0.0, "malformed": 0.0}
            after["hack"] = 1 - hacked_right
            mixtures.append({k: (1 - hacked) * before[k] + hacked * after[k] for k in before})
        lines = rollout_steps(mixtures, seed)
        assert lines[-1]["response_length/mean"] < lines[0]["response_length/mean"]
        alerts = alerts_of(make_stage(lines), "grpo-ktg")
        assert "format_only" in codes(alerts), seed
        assert first_step(alerts, "format_only") <= within, seed


def test_learning_both_is_no_hack(rollout_steps, make_stage) -> None:
    """Format saturates within 20 steps; accuracy rises slowly over 120."""
    for seed in range(5):
        mixtures = []
        for k in range(120):
            malformed, right = max(0.03, 0.3 - 0.015 * k), 0.2 + 0.3 * k / 120
            rest = {"right": right, "wrong": 1 - right}
            mixtures.append(
                {n: share * (1 - malformed) for n, share in rest.items()} | {"malformed": malformed}
            )
        reader = make_stage(rollout_steps(mixtures, seed))
        assert codes(alerts_of(reader, "grpo-ktg")) == [], seed


def test_rollouts_that_collapse_into_nonsense_raise_three_alerts(rollout_steps, make_stage) -> None:
    good = {"right": 0.4, "wrong": 0.55, "malformed": 0.05}
    lines = rollout_steps([good] * 30 + [{"malformed": 1.0}] * 10)
    for line in lines:  # as the trainer: the malformed response has no closed answer
        line["actor/kl_loss"] = 0.02
    alerts = alerts_of(make_stage(lines), "grpo-ktg")
    assert set(codes(alerts)) == {"reward_collapse", "parse_failures", "zero_variance"}
    assert all(31 <= alert.step <= 35 for alert in alerts)
    hard = next(a for a in alerts if a.code == "zero_variance")
    assert "too hard" in hard.text


def test_equal_groups_of_solved_prompts_are_too_easy(rollout_steps, make_stage) -> None:
    alerts = alerts_of(make_stage(rollout_steps([{"right": 1.0}] * 10)), "grpo-ktg")
    assert codes(alerts) == ["zero_variance"]
    assert alerts[0].step == 5
    assert "6.00 of 6" in alerts[0].text and "too easy" in alerts[0].text


def test_a_hang_and_a_restart_come_from_the_supervisors_verdicts(
    honest_steps, make_stage, fail_twice
) -> None:
    reader = make_stage(honest_steps(20))
    history, log = fail_twice(reader.root / "grpo-ktg")
    hang, restart = alerts_of(reader, "grpo-ktg")
    assert (hang.code, hang.level, hang.step) == ("hang", "error", 7)
    assert "stacks" in hang.text
    assert (restart.code, restart.level, restart.step) == ("restart", "warning", 12)
    assert "RuntimeError" in restart.text
    watch = AlertWatch(reader, "grpo-ktg")
    assert codes(watch.new_failures()) == ["hang", "restart"]
    assert watch.new_failures() == []
    history.judge("ended with status 1", log, 12, "RuntimeError: lost 3 of 128")
    (last,) = watch.update({"step": 13})
    assert (last.code, last.level) == ("restart", "error")  # not retried: it repeats


def test_a_resumed_attempt_replaces_its_steps(honest_steps, make_stage) -> None:
    lines = changed(honest_steps(40), 20, group__zero_variance_fraction=0.95)
    reader = make_stage(lines)
    whole = alerts_of(reader, "grpo-ktg")
    watch = AlertWatch(reader, "grpo-ktg")
    alerts = []
    for part in (lines[:26], lines[10:]):  # killed after step 26, resumed from step 10
        for line in part:
            alerts += watch.update(line)
    assert alerts == whole
    assert codes(whole) == ["zero_variance"]


def test_steps_that_a_resumed_attempt_replaces_no_longer_count(honest_steps, make_stage) -> None:
    """The first attempt's rewards from step 10 on are higher by 2; they are gone."""
    lines = honest_steps(40)
    higher = changed(lines, 10, reward__mean=lambda _, line: line["reward/mean"] + 2)
    watch = AlertWatch(make_stage(lines), "grpo-ktg")
    for line in [*higher[:30], *lines[9:]]:
        assert watch.update(line) == []


_VALUES = st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.integers())
_KEYS = [
    "reward/mean",
    "reward/format/mean",
    "reward/accuracy/mean",
    "actor/kl_loss",
    "group/zero_variance_fraction",
    "response_length/clip_ratio",
    "response_length/max",
    "reason/json_invalid",
    "disk/free_gib",
    "checkpoint/size_gib",
    "step",
]


@given(st.lists(st.dictionaries(st.sampled_from(_KEYS), _VALUES), max_size=25))
@settings(max_examples=60, deadline=None)
def test_no_line_of_metrics_stops_the_rules(lines) -> None:
    """An alert must not end a training run."""
    watch = AlertWatch(RunReader(Path("/nonexistent")), "grpo-ktg")
    for number, line in enumerate(lines):
        watch.update({"step": number + 1} | line)


def test_a_step_costs_less_than_two_milliseconds(honest_steps, make_stage) -> None:
    lines = [line | {f"other/{k}": 0.5 for k in range(120)} for line in honest_steps(2000)]
    watch = AlertWatch(make_stage([]), "grpo-ktg")
    begin = time.process_time()
    for line in lines:
        watch.update(line)
    assert (time.process_time() - begin) / len(lines) < 2e-3


def test_every_rule_and_code_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "alerts.md").read_text()
    for code in [*(rule.code for rule in RULES), "hang", "restart"]:
        assert f"`{code}`" in page, code
