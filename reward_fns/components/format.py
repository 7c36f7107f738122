"""`format`: the format reward R_f (sections 3.2, 3.3 and A.2 of the paper).

aks (agentic keyframe selection), at most 1: the response is well formed and the answer is exactly
one of the options.
kfg (keyframe generation), at most 1: the response is well formed and the answer is the bare index
of a frame that was shown.
ktg (keyframe target grounding), at most 3: 1 for a well-formed response, plus the mean over the
answer's items of 1 for a valid box and 1 for a valid point. An invalid item costs only its share.

Coordinates outside the image are valid here; they earn no accuracy.
"""

from __future__ import annotations

from typing import Any

from rcot_rl.protocol.parser import parse_keyframe, parse_option
from rcot_rl.recipe.base import Section
from reward_fns.registry import Response, Settings, Term, register


class Format(Section):
    """Parameters of `format`."""

    require_thought: bool = False
    """Treat an empty `<think></think>` as malformed."""


def maximum(params: Format, settings: Settings) -> float:
    """Return the greatest possible value: 3 for ktg, else 1."""
    return 3.0 if settings.task == "ktg" else 1.0


@register("format", params=Format, tasks=("aks", "ktg", "kfg"), maximum=maximum)
def format_reward(response: Response, truth: Any, params: Format, settings: Settings) -> Term:
    """Return R_f of a response. Only kfg reads the ground truth: the number of frames."""
    parsed = response.parsed
    if parsed.well_formed and settings.task == "ktg" and not params.require_thought:
        grounding = response.grounding
        if grounding.n_items and not grounding.has_faulty:
            return Term(3.0)
    reasons: list[str] = list(parsed.faults)
    if params.require_thought and not parsed.thought:
        reasons.append("thought_empty")
    structure = 0.0 if reasons else 1.0
    if settings.task == "ktg":
        items = item_format(response, settings.zero_target)
        return Term(structure + items.value, reasons + items.reasons)
    answer = parsed.answer
    if settings.task == "kfg":
        if answer is None or parse_keyframe(answer, len(truth.areas)) is None:
            return Term(0.0, [*reasons, "answer_missing" if answer is None else "keyframe_unknown"])
        return Term(structure, reasons)
    if parse_option(answer, settings.options) is None:
        return Term(0.0, [*reasons, "answer_missing" if answer is None else "option_unknown"])
    return Term(structure, reasons)


def item_format(response: Response, zero_target: bool) -> Term:
    """Return the mean over the items of [box is valid] + [point is valid], at most 2."""
    grounding = response.grounding
    if not grounding.is_list:
        return Term(0.0, list(grounding.faults))
    if grounding.n_items == 0:
        return Term(2.0) if zero_target else Term(0.0, ["list_empty"])
    faulty = [item for item in grounding.items if item.faults]
    lost = sum((item.box is None) + (item.point is None) for item in faulty)
    faults = dict.fromkeys(fault for item in faulty for fault in item.faults)
    return Term((2 * grounding.n_items - lost) / grounding.n_items, list(faults))
