"""Figures of the pipeline's requests: costs (Tables 10 to 12, Figure 10) and verdicts of AKS.

The stages are those of Figure 10: VDG (video description), KFG (first keyframe), AKS (agentic
keyframe selection: judgements and re-selections), KTG (keyframe target grounding) and SAM2.

Several queries about a video can share one request, such as its description: its response is then
in each of their traces. Sums count it once, also if a resumed run sent it again. Masks that several
queries share are counted in the same way: their traces have the same prompts and the seconds of the
one pass that made them. The seconds of a single query are those of every request in its trace and
of its masks, because the query needs all of them.

Seconds are measured in the engine, without the time in the queue. With many requests in progress
they are latencies of a shared batch, not costs; docs/evaluation.md says how to time requests one
after another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np

from rcot_rl.evaluation.predictions import KeyframeTrace, RecordedStep
from rcot_rl.protocol.parser import parse_option, parse_response
from rcot_rl.recipe.inference_section import PolicyTask

REQUESTS = "requests"
"""Key of a row's requests, which `pipeline_costs` needs; not part of the results."""

_SAM2 = "sam2"
_STAGES: tuple[PolicyTask, ...] = get_args(PolicyTask)
_OPTIONS = ("A", "B")


def step_figures(trace: KeyframeTrace, areas: np.ndarray) -> dict[str, Any]:
    """Return the figures of one expression.

    Args:
        trace: The prediction's trace.
        areas: Pixels of the target in each frame, int [T]; -1 without ground truth.

    Returns:
        The row's keys:

            keyframe_seconds      VDG, KFG and AKS
            segmentation_seconds  KTG and SAM2; both None if they were not recorded
            aks_verdicts          [{"frame", "option", "probability", "visible"}]: the option, A, B
                                  or None; the probability of A, or None; whether the frame shows
                                  the target, None without ground truth
            requests              see `REQUESTS`; None if seconds were not recorded
    """
    timed = None not in [step.seconds for step in trace.steps]
    timed = timed and (bool(trace.steps) or trace.segment_seconds is not None)
    keyframe = segmentation = None
    if timed:
        keyframe = _seconds(step for step in trace.steps if step.task != "ktg")
        if trace.segment_seconds is not None:
            grounding = _seconds(step for step in trace.steps if step.task == "ktg")
            segmentation = grounding + trace.segment_seconds
    return {
        "keyframe_seconds": keyframe,
        "segmentation_seconds": segmentation,
        "segment_seconds": trace.segment_seconds,
        "aks_verdicts": [_verdict(step, areas) for step in trace.steps if step.task == "aks"],
        REQUESTS: [*map(_request, trace.steps), _mask_request(trace)] if timed else None,
    }


def pipeline_costs(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what the expressions' requests cost; None if no trace has recorded seconds.

    Args:
        rows: Rows with "video" and, if they have a trace, the keys of `step_figures`.

    Returns:
        JSON values:

            n_queries             number of expressions with recorded seconds
            keyframe_seconds, segmentation_seconds
                                  means over them (Tables 11 and 12)
            stages                {stage: {requests, seconds, relative, prompt_tokens,
                                  uncached_tokens, generated_tokens}}, totals; SAM2 has no tokens;
                                  relative: seconds where those of KTG and SAM2 are 1 (Figure 10)
            aks_extra             seconds of AKS in percent of all other stages (Table 10)

        None for a figure that needs seconds of SAM2, if a trace lacks them.
    """
    timed = [row for row in rows if row.get(REQUESTS) is not None]
    if not timed:
        return None
    sent = {(row["video"], one["key"]): one for row in timed for one in row[REQUESTS]}
    stages: dict[str, dict[str, Any]] = {
        stage: _total([one for one in sent.values() if one["stage"] == stage]) for stage in _STAGES
    }
    passes = [one for one in sent.values() if one["stage"] == _SAM2]
    masks = _sum_or_none([one["seconds"] for one in passes])
    stages[_SAM2] = {"requests": len(passes), "seconds": masks}
    unit = extra = None
    if masks is not None and stages["ktg"]["requests"]:
        unit = stages["ktg"]["seconds"] + masks
        others = stages["vdg"]["seconds"] + stages["kfg"]["seconds"] + unit
        extra = 100 * stages["aks"]["seconds"] / others if others else None
    for figures in stages.values():
        figures["relative"] = figures["seconds"] / unit if unit else None
    return {
        "n_queries": len(timed),
        "keyframe_seconds": _mean([row["keyframe_seconds"] for row in timed]),
        "segmentation_seconds": _mean([row["segmentation_seconds"] for row in timed]),
        "stages": stages,
        "aks_extra": extra,
    }


def aks_verdicts(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return how the judgements of AKS agree with the ground truth; None without judgements.

    A is right if the frame shows the target: the union of its masks is not empty. B is right
    otherwise.

    Returns:
        JSON values; shares in percent, None without a judgement to divide by:

            n, n_unknown     judgements of frames with and without ground truth; the other figures
                             are about the former
            confusion        {"A" | "B" | "none": {"visible": count, "absent": count}}; none: the
                             response names neither option
            accuracy         share of right verdicts
            precision_A, recall_A, precision_B, recall_B
            probability_visible, probability_absent
                             mean probability of A where the target is visible, and where it is not
            brier            mean of (probability of A - 1 if visible else 0)²
            n_probabilities  number of judgements with a probability
    """
    verdicts = [v for row in rows for v in row.get("aks_verdicts", ())]
    known = [v for v in verdicts if v["visible"] is not None]
    if not verdicts:
        return None

    def count(option: str | None, visible: bool) -> int:
        return sum(v["option"] == option and v["visible"] == visible for v in known)

    confusion = {
        option or "none": {"visible": count(option, True), "absent": count(option, False)}
        for option in (*_OPTIONS, None)
    }
    right = {"A": confusion["A"]["visible"], "B": confusion["B"]["absent"]}
    n_visible = sum(v["visible"] for v in known)
    actual = {"A": n_visible, "B": len(known) - n_visible}
    chances = [(v["probability"], v["visible"]) for v in known if v["probability"] is not None]
    return {
        "n": len(known),
        "n_unknown": len(verdicts) - len(known),
        "confusion": confusion,
        "accuracy": _percent(sum(right.values()), len(known)),
        **{f"precision_{o}": _percent(right[o], sum(confusion[o].values())) for o in _OPTIONS},
        **{f"recall_{o}": _percent(right[o], actual[o]) for o in _OPTIONS},
        "probability_visible": _mean([p for p, visible in chances if visible]),
        "probability_absent": _mean([p for p, visible in chances if not visible]),
        "brier": _mean([(p - visible) ** 2 for p, visible in chances]),
        "n_probabilities": len(chances),
    }


def _request(step: RecordedStep) -> dict[str, Any]:
    return {
        "key": _digest([step.task, step.frame, step.frames, step.prompt]),
        "stage": "aks" if step.task == "kfg_again" else step.task,
        "seconds": step.seconds,
        "prompt_tokens": step.prompt_tokens,
        "uncached_tokens": max(0, step.prompt_tokens - step.cached_tokens),
        "generated_tokens": step.tokens,
    }


def _mask_request(trace: KeyframeTrace) -> dict[str, Any]:
    # traces of separate passes with equal prompts differ in the seconds
    content = [trace.keyframe, trace.boxes_source, trace.points_source, trace.segment_seconds]
    return {"key": _digest([_SAM2, *content]), "stage": _SAM2, "seconds": trace.segment_seconds}


def _digest(content: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _verdict(step: RecordedStep, areas: np.ndarray) -> dict[str, Any]:
    known = step.frame is not None and areas[step.frame] >= 0
    return {
        "frame": step.frame,
        "option": parse_option(parse_response(step.response).answer, _OPTIONS),
        "probability": (step.option_probabilities or {}).get("A"),
        "visible": bool(areas[step.frame] > 0) if known else None,
    }


def _total(requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    keys = ("seconds", "prompt_tokens", "uncached_tokens", "generated_tokens")
    return {"requests": len(requests), **{k: sum(one[k] for one in requests) for k in keys}}


def _seconds(steps: Iterable[RecordedStep]) -> float:
    return sum(step.seconds or 0.0 for step in steps)


def _sum_or_none(values: Sequence[float | None]) -> float | None:
    """Return the sum; None if a value is missing."""
    return None if None in values else sum(value or 0.0 for value in values)


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if there is no value, or one is missing."""
    total = _sum_or_none(values)
    return None if total is None or not values else total / len(values)
