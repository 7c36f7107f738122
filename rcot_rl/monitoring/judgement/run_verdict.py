"""The verdict on a run in words: what training changed, through what, and what to try next.

Each sentence follows from a rule (docs/alerts.md):

    rose, fell      the 95 % interval of a change excludes 0. Sampled reward: last third of the
                    steps minus the first (`stats/trend.py`). Held-out reward: paired over prompts.
                    J&F: paired over expressions, with clips as the sample.
    no change shown the interval includes 0
    through form    the part of the rise that comes from components that never read the ground truth

If nothing changed, "rose" is stated in about 2.5 % of the cases. What is missing in the run folder
is reported as unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rcot_rl.monitoring.judgement.changes import (
    Direction,
    MasksChange,
    direction,
    masks_between,
    number_text,
)
from rcot_rl.monitoring.judgement.next_steps import next_steps
from rcot_rl.monitoring.judgement.stage_verdict import (
    StageVerdict,
    judge_grpo,
    judge_sft,
    own_directions,
)
from rcot_rl.monitoring.run_files.run_reader import RunReader

VerdictLevel = Literal["good", "mixed", "bad", "unknown"]


@dataclass(frozen=True)
class RunVerdict:
    """What is known about a run."""

    headline: str
    """One sentence."""

    level: VerdictLevel
    stages: list[StageVerdict]
    next_steps: list[str]
    """Suggestions, the most important one first; each names a key of the recipe or a place."""


def judge_run(reader: RunReader) -> RunVerdict:
    """Judge a run by its files, also one in progress. Never raises on incomplete folders."""
    heldout, scores = reader.heldout(), reader.scores()
    stages = []
    for view in map(reader.stage, reader.training_stages):
        if view.kind == "sft":
            stages.append(judge_sft(reader, view))
        elif view.kind == "grpo":
            stages.append(judge_grpo(reader, view, heldout, scores))
    grpo = [s for s in stages if s.facts["kind"] == "grpo" and s.facts["steps"]]
    masks = _overall_masks(reader, scores, grpo)
    way = direction(masks.change if masks is not None else None)
    headline = _headline(grpo, masks) if grpo else _before_grpo(stages)
    return RunVerdict(headline, _level(grpo, masks), stages, next_steps(stages, way))


def _overall_masks(
    reader: RunReader, scores: Mapping[str, Any], stages: Sequence[StageVerdict]
) -> MasksChange | None:
    """Return J&F before the first GRPO stage and after the last one that was scored."""
    start = reader.start_of(stages[0].stage) if stages else None
    if start is None:
        return None
    ends = (masks_between(scores, start, stage.stage) for stage in reversed(stages))
    return next((masks for masks in ends if masks is not None), None)


def _level(stages: Sequence[StageVerdict], masks: MasksChange | None) -> VerdictLevel:
    """Return the run's level.

    Args:
        stages: The GRPO stages that have steps.
        masks: Change of J&F over all of them.

    bad: a stage's own reward or J&F fell, or a reward rises through format alone, or an alert of
    level error on the steps. good: the own reward of each stage rose, no other task's fell, and
    J&F rose or was not measured. unknown: no direction is known. mixed: anything else.
    """
    ways = [way for stage in stages for way in own_directions(stage.facts)]
    jf = direction(masks.change) if masks is not None else "unknown"
    alarming = any(s.facts.get("form_alone") or s.facts.get("errors") for s in stages)
    if "fell" in ways or jf == "fell" or alarming:
        return "bad"
    if set(ways) <= {"unknown"}:
        return "unknown"
    forgets = any(stage.facts.get("forgotten") for stage in stages)
    if set(ways) == {"rose"} and jf in ("rose", "unknown") and not forgets:
        return "good"
    return "mixed"


def _headline(stages: Sequence[StageVerdict], masks: MasksChange | None) -> str:
    """Return one sentence on the rewards and masks of the GRPO stages that have steps."""
    by_way: dict[Direction, list[str]] = {}
    for stage in stages:
        for way, text in _reward_texts(stage):
            by_way.setdefault(way, []).append(text)
    parts = [
        _WAY_TEXTS[way].format(" and ".join(by_way[way])) for way in _WAY_TEXTS if way in by_way
    ]
    sentence = "; ".join(parts)
    if masks is None:
        return f"{sentence[0].upper()}{sentence[1:]}; J&F before and after was not measured."
    verb = {"rose": "masks follow", "fell": "masks got worse"}.get(
        direction(masks.change), "masks: no change shown"
    )
    return f"{sentence[0].upper()}{sentence[1:]}; {verb} (J&F {masks.text})."


def _before_grpo(stages: Sequence[StageVerdict]) -> str:
    """Return one sentence on a run without steps of GRPO."""
    losses = [stage.facts["loss"] for stage in stages if "loss" in stage.facts]
    if not losses:
        return "Nothing to judge yet: no step is logged."
    first, last = losses[-1]["before"], losses[-1]["after"]
    return f"The SFT loss went from {first:.3f} to {last:.3f}; no step of GRPO is logged."


_WAY_TEXTS: Mapping[Direction, str] = {
    "fell": "the reward fell in {}",
    "rose": "the reward rose in {}",
    "unclear": "no change of the reward is shown in {}",
    "unknown": "too few steps to judge {}",
}


def _reward_texts(stage: StageVerdict) -> list[tuple[Direction, str]]:
    """Return direction and text of a stage's own rewards: held out, or else of the rollouts."""
    facts, texts = stage.facts, []
    own = {t: r for t, r in (facts.get("heldout") or {}).items() if r.get("own")}
    measured = [(r["sampled"], r.get("form_share"), t) for t, r in own.items() if "sampled" in r]
    alone = " through format alone" if facts.get("form_alone") else ""
    if not measured:
        sampled = facts.get("sampled")
        if sampled is None:
            return [("unknown", stage.stage)]
        change = number_text(sampled["before"], sampled["after"])
        return [(sampled["direction"], f"{stage.stage} ({change} sampled){alone}")]
    for values, share, task in measured:
        form = f", {100 * share:.0f} % of it format" if share is not None and not alone else ""
        which = f", {task.upper()}" if len(measured) > 1 else ""
        change = number_text(values["before"], values["after"])
        text = f"{stage.stage} ({change} held out{which}{form}){alone}"
        texts.append((values["direction"], text))
    return texts
