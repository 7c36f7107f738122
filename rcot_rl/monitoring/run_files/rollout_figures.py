"""Figures of one step's rollouts that training does not log, for reports and trackers alike.

They need the responses themselves: why a group gives no gradient, whether length pays, which
verdicts of AKS (agentic keyframe selection) are confused, and how the boxes of KTG (keyframe target
grounding) compare with the true ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rcot_rl.monitoring.run_files.rollout_files import Box, Rollout, groups_of
from rcot_rl.protocol.parser import parse_option
from rcot_rl.stats.rollout_rows import NO_SPREAD
from reward_fns.components.hungarian_match import box_iou

OPTIONS = ("A", "B")
_MOST_OBJECTS = 32
"""Objects of a response that are measured: no honest answer has more."""
_AT_MAXIMUM = 1e-6
"""A reward this close to the maximum has reached it."""


def rollout_figures(rollouts: Sequence[Rollout], maximum: float | None) -> dict[str, float]:
    """Return the figures of a step by key; those without a value are left out.

    Args:
        rollouts: The step's responses.
        maximum: Greatest possible reward; None if unknown.
    """
    return (
        group_figures(rollouts, maximum)
        | length_figures(rollouts)
        | verdict_figures(rollouts)
        | box_figures(rollouts)
        | episode_figures(rollouts)
    )


def group_figures(rollouts: Sequence[Rollout], maximum: float | None) -> dict[str, float]:
    """Split the share of groups without variance (no gradient, eq. 14) into two.

    Too easy: every response has the maximum reward, or (AKS) names the right option. Too hard: the
    other groups without variance. The two add up to `group/zero_variance_fraction`. For KTG with an
    unknown maximum they cannot be told apart and are left out.
    """
    groups = list(groups_of(rollouts).values())
    if not groups or (maximum is None and any(r.task != "aks" for r in rollouts)):
        return {}
    flat = [group for group in groups if np.std([r.reward for r in group]) < NO_SPREAD]
    easy = sum(all(_is_solved(r, maximum) for r in group) for group in flat)
    return {
        "group/too_easy_fraction": easy / len(groups),
        "group/too_hard_fraction": (len(flat) - easy) / len(groups),
    }


def length_figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return how length and reward go together within groups: Pearson's correlation.

    Both are centred on their group's mean, because a hard prompt changes both. Left out without
    lengths, or if either does not vary.
    """
    lengths, rewards = [], []
    for group in groups_of(rollouts).values():
        known = [(r.tokens, r.reward) for r in group if r.tokens is not None]
        if known:
            centred = np.array(known, dtype=float)
            centred -= centred.mean(axis=0)
            lengths.append(centred[:, 0])
            rewards.append(centred[:, 1])
    if not lengths:
        return {}
    x, y = np.concatenate(lengths), np.concatenate(rewards)
    spread = float(np.sqrt((x @ x) * (y @ y)))
    return {"response_length/reward_correlation": float(x @ y) / spread} if spread > 1e-9 else {}


def verdict_figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the confusion of AKS verdicts: `aks/A_as_B` counts responses B to a frame that is A.

    The six counts add up to the number of responses to AKS prompts with a known truth.
    """
    judged = [r for r in rollouts if r.task == "aks" and r.truth in OPTIONS]
    if not judged:
        return {}
    counts = {f"aks/{truth}_as_{given}": 0.0 for truth in OPTIONS for given in (*OPTIONS, "none")}
    for rollout in judged:
        counts[f"aks/{rollout.truth}_as_{verdict_of(rollout) or 'none'}"] += 1
    return counts


def verdict_of(rollout: Rollout) -> str | None:
    """Return the option that a response names; None without one."""
    return parse_option(rollout.answer, OPTIONS)


def box_figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return how the boxes of KTG responses compare with the true ones.

    ktg/box_area_ratio     median over responses with boxes: sum of their areas over that of the
                           true boxes
    ktg/box_iou            mean over true objects of the best IoU of a predicted box
    ktg/objects_predicted, ktg/objects_true, ktg/right_count_fraction
                           valid boxes and true objects per response; share of responses with as
                           many
    """
    ratios, ious, predicted_counts, true_counts = [], [], [], []
    for rollout in rollouts:
        if rollout.task != "ktg":
            continue
        true = [box for box, _ in rollout.true_objects]
        objects = rollout.predicted_objects
        predicted = [box for box, _ in objects[:_MOST_OBJECTS]]
        predicted_counts.append(len(objects))
        true_counts.append(len(true))
        ious += [max((box_iou(p, t) for p in predicted), default=0.0) for t in true]
        true_area = sum(map(_area, true))
        if predicted and true_area > 0:
            ratios.append(sum(map(_area, predicted)) / true_area)
    if not true_counts:
        return {}
    figures = {
        "ktg/objects_predicted": float(np.mean(predicted_counts)),
        "ktg/objects_true": float(np.mean(true_counts)),
        "ktg/right_count_fraction": float(np.mean(np.equal(predicted_counts, true_counts))),
    }
    if ious:
        figures["ktg/box_iou"] = float(np.mean(ious))
    if ratios:
        figures["ktg/box_area_ratio"] = float(np.median(ratios))
    return figures


def episode_figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return means over agentic episodes: judgements, and area of the chosen keyframe.

    The area is relative to the target's largest one in the clip.
    """
    columns = {"agentic/keyframe_area_ratio": "area", "agentic/rounds": "judgements"}
    figures = {}
    for key, name in columns.items():
        values = [r.outcome.get(name) for r in rollouts]
        known = [float(v) for v in values if isinstance(v, int | float)]
        if known:
            figures[key] = float(np.mean(known))
    return figures


def _is_solved(rollout: Rollout, maximum: float | None) -> bool:
    if maximum is not None and rollout.reward >= maximum - _AT_MAXIMUM:
        return True
    return rollout.task == "aks" and verdict_of(rollout) == rollout.truth


def _area(box: Box) -> float:
    x1, y1, x2, y2 = box
    return max(0.0, x2 - x1) * max(0.0, y2 - y1)
