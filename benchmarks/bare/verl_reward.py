"""The `aks` reward as a function for verl's `naive` reward manager, for `bench_step`."""

from typing import Any

from reward_fns.score import load_reward

REWARD = load_reward("aks")


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any
) -> float:
    """Return the reward."""
    return REWARD.score(solution_str, ground_truth).reward
