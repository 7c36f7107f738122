"""`chosen_area`: the outcome of an episode, read from the row."""

from __future__ import annotations

import pytest

from rcot_rl.errors import InputError
from reward_fns.score import load_reward

RESPONSE = "<think>it is left</think><answer>A</answer>"


def row(area: object) -> dict[str, object]:
    return {"extra_info": {"agentic": {"area": area}}}


@pytest.mark.parametrize(("area", "total"), [(1, 4.0), (0.25, 3.25), (0.0, 3.0)])
def test_the_relative_area_is_added_to_the_reward(area: float, total: float) -> None:
    reward = load_reward("aks-agentic")
    assert reward.max_reward == 4.0
    score = reward.score(RESPONSE, "A", **row(area))
    assert score.reward == total
    assert bool(score.reasons) == (area < 1)


@pytest.mark.parametrize("area", [None, True, "1", 1.5, -0.1, float("nan")])
def test_rows_without_a_valid_outcome_raise(area: object) -> None:
    with pytest.raises(InputError, match=r"extra_info\.agentic\.area"):
        load_reward("aks-agentic").score(RESPONSE, "A", **row(area))
