"""`chosen_area`: relative target area in the frame that an agentic AKS episode chose.

The agentic rollout adds the outcome to the row as `extra_info.agentic.area`: the targets' area in
the chosen frame over their largest area in any candidate frame (see `rcot_rl.training.agentic`).
"""

from __future__ import annotations

import math
from typing import Any

from rcot_rl.errors import InputError
from reward_fns.components.keyframe_area import share_term
from reward_fns.registry import NoParams, Response, Settings, Term, register

KEY = "extra_info.agentic.area"


@register("chosen_area", params=NoParams, tasks=("aks",), maximum=1.0)
def chosen_area(response: Response, truth: str, params: NoParams, settings: Settings) -> Term:
    """Return the relative area, 0 to 1. Raises InputError if the row has no outcome."""
    return share_term(_share(response.row))


def _share(row: Any) -> float:
    value = row
    for name in KEY.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= 1:
        raise InputError("must be a number from 0 to 1, written by an agentic rollout", key=KEY)
    return float(value)
