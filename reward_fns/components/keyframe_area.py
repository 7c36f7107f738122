"""`keyframe_area`: relative target area in the chosen frame, at most 1.

The temporal reward of Veason-R1: the targets' area in the chosen frame over their largest area in
any frame shown. Supports `veason` (keyframe and boxes in one answer) and `kfg`, where the answer is
the bare index of a frame (eq. 1 of the paper).

If no frame shows a target, every valid choice earns 1.
"""

from __future__ import annotations

from rcot_rl.protocol.parser import parse_keyframe
from reward_fns.baselines.veason_answer import veason_answer
from reward_fns.ground_truth import KeyframeTruth
from reward_fns.registry import NoParams, Response, Settings, Term, register


@register("keyframe_area", params=NoParams, tasks=("kfg", "veason"), maximum=1.0)
def keyframe_area(
    response: Response, truth: KeyframeTruth, params: NoParams, settings: Settings
) -> Term:
    """Return the area in the chosen frame over the largest; 0 for an unknown frame."""
    answer = response.parsed.answer
    if answer is None:
        return Term(0.0, ["answer_missing"])
    if settings.task == "kfg":
        position = parse_keyframe(answer, len(truth.areas))
    else:
        chosen = veason_answer(response).keyframe
        position = truth.ids.index(chosen) if chosen in truth.ids else None
    if position is None:
        return Term(0.0, ["keyframe_unknown"])
    largest = max(truth.areas)
    if largest == 0:
        return Term(1.0)
    return share_term(truth.areas[position] / largest)


def share_term(share: float) -> Term:
    """Return the term of a chosen frame that shows `share` of the target's largest area."""
    if share == 0:
        return Term(0.0, ["keyframe_without_target"])
    return Term(share) if share == 1 else Term(share, ["keyframe_not_largest"])
