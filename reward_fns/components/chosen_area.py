"""`chosen_area`: how much of the targets the frame shows at which an agentic AKS episode ended.

The agentic rollout writes the outcome beside the row: `extra_info.agentic.area`, the targets' area
in the chosen frame over the greatest in any frame to choose from (see `rcot_rl.training.agentic`).
"""

from __future__ import annotations

import math
from typing import Any

from rcot_rl.errors import InputError
from rcot_rl.recipe.base import Section
from reward_fns.registry import Response, Settings, Term, register

KEY = "extra_info.agentic.area"


class ChosenArea(Section):
    """Parameters of `chosen_area`: none."""


def _one(params: ChosenArea, settings: Settings) -> float:
    return 1.0


@register("chosen_area", params=ChosenArea, tasks=("aks",), maximum=_one)
def chosen_area(response: Response, truth: str, params: ChosenArea, settings: Settings) -> Term:
    """The share, 0 to 1. Raises InputError for a row without an episode's outcome."""
    share = _share(response.row)
    if share == 0:
        return Term(0.0, ["keyframe_without_target"])
    return Term(share) if share == 1 else Term(share, ["keyframe_not_largest"])


def _share(row: Any) -> float:
    value = row
    for name in KEY.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= 1:
        raise InputError("must be a number from 0 to 1, as agentic rollouts write it", key=KEY)
    return float(value)
