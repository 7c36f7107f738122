"""What a step's metrics say about reasons, seconds and users' components."""

from __future__ import annotations

import pytest

from rcot_rl.training.group_metrics import MAX_CODES, reward_metrics


def row(reward: float = 0.0, reasons: tuple[str, ...] = (), **more) -> dict:
    return {"uid": "a", "reward": reward, "components": {}, "reasons": list(reasons)} | more


def test_reasons_as_shares_and_counts() -> None:
    rows = [row(1.0), row(0.0, ("deadline", "deadline")), row(0.0, ("deadline", "x")), row(1.0)]
    found = reward_metrics(rows)
    assert found["reason/deadline"] == 0.5 and found["reason_count/deadline"] == 2.0
    assert found["reason/x"] == 0.25 and found["reason_count/x"] == 1.0


def test_a_function_that_writes_numbers_into_reasons_makes_few_metrics() -> None:
    rows = [row(0.0, (f"iou={i}", "often")) for i in range(200)]
    found = {k: v for k, v in reward_metrics(rows).items() if k.startswith("reason_count/")}
    assert len(found) == MAX_CODES + 1
    assert found["reason_count/often"] == 200
    assert sum(found.values()) == 400  # none is lost


def test_seconds_where_they_are_known() -> None:
    assert not [k for k in reward_metrics([row(), row()]) if "seconds" in k]
    found = reward_metrics([row(seconds=1.0), row(seconds=3.0), row(seconds=None)])
    assert (found["reward/seconds_mean"], found["reward/seconds_max"]) == (2.0, 3.0)


def test_a_component_that_a_failed_row_lacks_is_zero_there() -> None:
    rows = [row(), row(1.0, components={"a": 1.0}), row(1.0, components={"a": 1.0})]
    assert reward_metrics(rows)["reward/a/mean"] == pytest.approx(2 / 3)
