"""Component means and group health of a step, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rcot_rl.training.group_metrics import reward_metrics


def row(uid: str, reward: float, reasons: tuple[str, ...] = (), **components: float) -> dict:
    return {"uid": uid, "reward": reward, "components": components, "reasons": list(reasons)}


# three groups: one alike at 3, one alike at 0 and one apart; rows of groups are not neighbours
ROWS: list[dict[str, Any]] = [
    row("a", 3.0, format=1.0, accuracy=1.0),
    row("b", 0.0, ("structure", "option"), format=0.0, accuracy=0.0),
    row("c", 1.0, ("option",), format=1.0, accuracy=0.0),
    row("a", 3.0, format=1.0, accuracy=1.0),
    row("b", 0.0, ("structure", "structure", "option"), format=0.0, accuracy=0.0),
    row("c", 2.0, ("structure",), format=0.0, accuracy=1.0),
]


def test_by_hand() -> None:
    found = reward_metrics(ROWS)
    # rewards 3 0 1 3 0 2: mean 9/6, mean square 23/6, variance 23/6 - 9/4 = 19/12
    # spreads 0, 0 and 1/2; format is 1 in 3 of 6, accuracy in 3 of 6: mean and deviation 1/2
    assert found == pytest.approx(
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


def test_a_reason_counts_once_a_response() -> None:
    rows = [row("a", 0.0, ("box_far",) * 5), row("a", 1.0), row("a", 1.0), row("a", 1.0)]
    assert reward_metrics(rows)["reason/box_far"] == 0.25


def test_the_order_of_responses_does_not_matter() -> None:
    assert reward_metrics(ROWS[::-1]) == pytest.approx(reward_metrics(ROWS))


def test_rounding_is_no_variance_but_the_smallest_step_of_a_reward_is() -> None:
    alike = [row("a", 0.1 + 0.2), row("a", 0.3)]
    apart = [row("b", 1.0), row("b", 1.0 + 1 / 120)]
    assert reward_metrics(alike)["group/zero_variance_fraction"] == 1.0
    assert reward_metrics(apart)["group/zero_variance_fraction"] == 0.0
    assert reward_metrics(alike + apart)["group/zero_variance_fraction"] == 0.5


def test_values_are_plain_floats_as_json_needs() -> None:
    assert {type(value) for value in reward_metrics(ROWS).values()} == {float}
