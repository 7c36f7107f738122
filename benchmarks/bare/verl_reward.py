"""The `aks` reward as verl's own manager takes it, for `bench_step`."""

from typing import Any

from reward_fns.score import load_reward

REWARD = load_reward("aks")


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any
) -> float:
    """The reward alone."""
    return REWARD.score(solution_str, ground_truth).reward
