"""Per-task advantages: scale, grouping and order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.training.advantage import per_task

centered_rewards = st.lists(
    st.integers(-6000, 6000).map(lambda v: v / 1000), min_size=1, max_size=40
)


@settings(deadline=None)
@given(centered_rewards, st.sampled_from([0.01, 0.3, 1.0, 7.0, 100.0]))
def test_advantages_do_not_depend_on_a_tasks_scale(values: list[float], scale: float) -> None:
    values = [*values, 1.0]  # some spread, so that verl's guard in the denominator is negligible
    one = per_task(np.array(values), ["aks"] * len(values))
    other = per_task(scale * np.array(values), ["aks"] * len(values))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


@settings(deadline=None)
@given(centered_rewards, centered_rewards)
def test_each_task_has_unit_spread_independent_of_the_other(
    aks: list[float], ktg: list[float]
) -> None:
    aks, ktg = [*aks, 1.0], [*ktg, -2.0]
    together = per_task(np.array(aks + ktg), ["aks"] * len(aks) + ["ktg"] * len(ktg))
    alone = per_task(np.array(aks), ["aks"] * len(aks))
    np.testing.assert_array_equal(together[: len(aks)], alone)
    assert np.sqrt(np.mean(together[len(aks) :] ** 2)) == pytest.approx(1, rel=1e-4)


@settings(deadline=None)
@given(centered_rewards, st.randoms())
def test_advantages_do_not_depend_on_the_order(values: list[float], random) -> None:
    tasks = [random.choice(["aks", "ktg"]) for _ in values]
    order = list(range(len(values)))
    random.shuffle(order)
    straight = per_task(np.array(values), tasks)
    shuffled = per_task(np.array([values[i] for i in order]), [tasks[i] for i in order])
    np.testing.assert_allclose(shuffled, straight[order], rtol=1e-9, atol=1e-12)


def test_no_spread_gives_no_advantage_and_lengths_must_agree() -> None:
    assert per_task(np.zeros(3), ["a", "a", "b"]).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="3 advantages of 2 tasks"):
        per_task(np.zeros(3), ["a", "b"])
