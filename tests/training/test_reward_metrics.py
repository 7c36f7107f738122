"""Component means and group health of a step, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rcot_rl.training.reward_metrics import MAX_CODES, reward_metrics


def row(uid: str, reward: float, reasons: tuple[str, ...] = (), **components: float) -> dict:
    return {"uid": uid, "reward": reward, "components": components, "reasons": list(reasons)}


# three groups: all 3, all 0, and 1 with 2; the rows of a group are not adjacent
ROWS: list[dict[str, Any]] = [
    row("a", 3.0, format=1.0, accuracy=1.0),
    row("b", 0.0, ("structure", "option"), format=0.0, accuracy=0.0),
    row("c", 1.0, ("option",), format=1.0, accuracy=0.0),
    row("a", 3.0, format=1.0, accuracy=1.0),
    row("b", 0.0, ("structure", "structure", "option"), format=0.0, accuracy=0.0),
    row("c", 2.0, ("structure",), format=0.0, accuracy=1.0),
]


def test_metrics_equal_those_worked_out_by_hand() -> None:
    metrics = reward_metrics(ROWS)
    # rewards 3 0 1 3 0 2: mean 9/6, mean square 23/6, variance 23/6 - 9/4 = 19/12
    # spreads 0, 0 and 1/2; format is 1 in 3 of 6, accuracy in 3 of 6: mean and deviation 1/2
    assert metrics == pytest.approx(
        {
            "reward/mean": 1.5,
            "reward/std": (19 / 12) ** 0.5,
            "group/zero_variance_fraction": 2 / 3,
            "group/reward_std_mean": 0.5 / 3,
            "reward/format/mean": 0.5,
            "reward/format/std": 0.5,
            "reward/accuracy/mean": 0.5,
            "reward/accuracy/std": 0.5,
            "reason/structure": 3 / 6,
            "reason/option": 3 / 6,
            "reason_count/structure": 3,
            "reason_count/option": 3,
        }
    )


def test_a_reason_counts_once_per_response() -> None:
    rows = [row("a", 0.0, ("box_far",) * 5), row("a", 1.0), row("a", 1.0), row("a", 1.0)]
    assert reward_metrics(rows)["reason/box_far"] == 0.25


def test_the_order_of_responses_does_not_matter() -> None:
    assert reward_metrics(ROWS[::-1]) == pytest.approx(reward_metrics(ROWS))


def test_rounding_is_not_variance_but_the_smallest_reward_step_is() -> None:
    equal = [row("a", 0.1 + 0.2), row("a", 0.3)]
    different = [row("b", 1.0), row("b", 1.0 + 1 / 120)]
    assert reward_metrics(equal)["group/zero_variance_fraction"] == 1.0
    assert reward_metrics(different)["group/zero_variance_fraction"] == 0.0
    assert reward_metrics(equal + different)["group/zero_variance_fraction"] == 0.5


def test_values_are_plain_floats_as_json_needs() -> None:
    assert {type(value) for value in reward_metrics(ROWS).values()} == {float}


def test_reasons_are_shares_and_counts() -> None:
    rows = [
        row("a", 1.0),
        row("a", 0.0, ("deadline", "deadline")),
        row("a", 0.0, ("deadline", "x")),
        row("a", 1.0),
    ]
    metrics = reward_metrics(rows)
    assert metrics["reason/deadline"] == 0.5 and metrics["reason_count/deadline"] == 2.0
    assert metrics["reason/x"] == 0.25 and metrics["reason_count/x"] == 1.0


def test_a_function_that_writes_numbers_into_reasons_makes_few_metrics() -> None:
    rows = [row("a", 0.0, (f"iou={i}", "often")) for i in range(200)]
    metrics = {k: v for k, v in reward_metrics(rows).items() if k.startswith("reason_count/")}
    assert len(metrics) == MAX_CODES + 1
    assert metrics["reason_count/often"] == 200
    assert sum(metrics.values()) == 400  # every reason is counted


def test_seconds_are_summarized_where_they_are_known() -> None:
    assert not [k for k in reward_metrics([row("a", 0.0)]) if "seconds" in k]
    metrics = reward_metrics([row("a", 0.0) | {"seconds": s} for s in (1.0, 3.0, None)])
    assert (metrics["reward/seconds_mean"], metrics["reward/seconds_max"]) == (2.0, 3.0)


def test_a_component_that_a_failed_row_lacks_is_zero_there() -> None:
    rows = [row("a", 0.0), row("a", 1.0, a=1.0), row("a", 1.0, a=1.0)]
    assert reward_metrics(rows)["reward/a/mean"] == pytest.approx(2 / 3)
