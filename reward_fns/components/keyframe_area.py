"""`keyframe_area`: how much of the target the chosen frame shows, at most 1.

The temporal reward of Veason-R1: the targets' area in the chosen frame over their greatest area in
any frame that was shown. Serves `veason` (keyframe and boxes in one answer) and `kfg`, where the
answer is a frame's bare index (eq. 1 of the paper).

Where no frame shows a target there is nothing to choose: every valid choice earns 1.
"""

from __future__ import annotations

from rcot_rl.protocol.parser import parse_keyframe
from rcot_rl.recipe.base import Section
from reward_fns.baselines.veason_answer import veason_answer
from reward_fns.ground_truth import Frames
from reward_fns.registry import Response, Settings, Term, register


class KeyframeArea(Section):
    """Parameters of `keyframe_area`: none."""


def _one(params: KeyframeArea, settings: Settings) -> float:
    return 1.0


@register("keyframe_area", params=KeyframeArea, tasks=("kfg", "veason"), maximum=_one)
def keyframe_area(
    response: Response, truth: Frames, params: KeyframeArea, settings: Settings
) -> Term:
    """Area at the chosen frame over the greatest; 0 for a frame that was not shown."""
    answer = response.parsed.answer
    if answer is None:
        return Term(0.0, ["answer_missing"])
    if settings.task == "kfg":
        at = parse_keyframe(answer, len(truth.areas))
    else:
        chosen = veason_answer(response).keyframe
        at = truth.ids.index(chosen) if chosen in truth.ids else None
    if at is None:
        return Term(0.0, ["keyframe_unknown"])
    greatest = max(truth.areas)
    if greatest == 0:
        return Term(1.0)
    share = truth.areas[at] / greatest
    if share == 0:
        return Term(0.0, ["keyframe_without_target"])
    return Term(share) if share == 1 else Term(share, ["keyframe_not_largest"])
