"""verl's custom reward function: a reward recipe of `reward_fns`, asked once per response.

verl loads this module in every reward worker by `reward.custom_reward_function.path`. Reward
recipes are loaded once per process.
"""

from __future__ import annotations

import functools
from typing import Any

from reward_fns.score import Reward, load_reward


@functools.lru_cache(maxsize=8)
def _reward(name: str, canvas: int) -> Reward:
    return load_reward(name, canvas=canvas)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    reward: str,
    canvas: int,
    **_: Any,
) -> dict[str, Any]:
    """Score one response (eq. 13).

    Returns `score`, the weighted sum; every component, unweighted, as `component/<name>`; and
    `reasons`, codes joined by ";". The keys are the same for every row, as verl requires.
    """
    score = _reward(reward, canvas).score(
        solution_str, ground_truth, data_source=data_source, extra_info=extra_info
    )
    components = {f"component/{name}": value for name, value in score.components.items()}
    return {"score": score.reward, **components, "reasons": ";".join(score.reasons)}
