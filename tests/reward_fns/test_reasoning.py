"""Rewards for the reasoning: repetition with and without full stops, soft length bounds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.errors import InputError
from reward_fns import load_reward


def reward(module: str, **params: object):
    parts = {"components": {"format": {"weight": 0.0}, "it": {"module": module, **params}}}
    return load_reward("aks", overrides=parts)


def value(rule, thought: str) -> tuple[float, list[str]]:
    score = rule.score(f"<think>{thought}</think><answer>A</answer>", "A")
    return score.components["it"], score.reasons


def test_repetition_counts_with_and_without_full_stops():
    one = reward("non_repeat", n=3, allowed=0.0)
    assert value(one, "the red ball is left of the blue cube and moves") == (1.0, [])
    # 12 words, 10 trigrams, 3 of them different
    assert value(one, "the red ball " * 4) == (pytest.approx(0.3), ["repeated"])
    assert value(one, "the red ball. " * 4)[0] == pytest.approx(0.3)
    assert value(one, "The Red ball\n" * 4)[0] == pytest.approx(0.3)


def test_a_decimal_is_one_word_and_not_a_repetition():
    one = reward("non_repeat", n=2, allowed=0.0)
    # split at full stops, "5" would follow "1" three times
    assert value(one, "1.5 then 1.5 or 2.5 to 1.5") == (1.0, [])
    lineage = load_reward("visionreasoner")
    response = "<think>1.5. 1.5. 1.5.</think><answer>[]</answer>"
    assert lineage.score(response, []).components["non_repeat"] == 0.0


def test_the_allowed_share_of_repetition_costs_nothing():
    allowed = reward("non_repeat", n=1, allowed=0.5)
    assert value(allowed, "a a b b") == (1.0, [])
    assert value(allowed, "a a a a") == (pytest.approx(0.5), ["repeated"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["a", "bb", "1.5", "!", "é"]), max_size=60).map(" ".join))
def test_repeating_the_whole_thought_never_earns_more(text):
    one = reward("non_repeat")
    once, twice = value(one, text)[0], value(one, f"{text} {text}")[0]
    assert 0.0 <= twice <= once <= 1.0


def test_length_is_linear_outside_both_bounds():
    one = reward("reasoning_length", least=10, most=20, end=40, empty=0.2)
    words = [value(one, "word " * n) for n in (0, 5, 9, 10, 20, 30, 40, 500)]
    assert [v for v, _ in words] == pytest.approx([0.2, 0.6, 0.92, 1.0, 1.0, 0.5, 0.0, 0.0])
    reasons = [r for _, r in words]
    assert reasons[:2] == [["thought_empty"], ["thought_short"]]
    assert reasons[3:6] == [[], [], ["thought_long"]]


def test_unit_characters_counts_characters():
    one = reward("reasoning_length", unit="characters", least=4, most=9, end=10)
    assert value(one, "左の赤い丸") == (1.0, [])
    assert value(one, "左の") == (0.5, ["thought_short"])


def test_a_missing_think_block_earns_nothing():
    for module in ("non_repeat", "reasoning_length"):
        score = reward(module).score("<answer>A</answer>", "A")
        assert (score.components["it"], score.reasons) == (0.0, ["thought_missing"])


def test_bounds_in_the_wrong_order_raise_with_the_key():
    with pytest.raises(InputError, match="least <= most < end") as caught:
        reward("reasoning_length", least=50, most=20)
    assert "components.it" in str(caught.value.key)
