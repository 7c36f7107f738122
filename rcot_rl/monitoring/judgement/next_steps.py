"""Suggest what to try next: rules on the facts of the stages' verdicts, one suggestion each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rcot_rl.monitoring.judgement.changes import Direction
from rcot_rl.monitoring.judgement.stage_verdict import StageVerdict, own_directions
from rcot_rl.stats.json_values import at

MOSTLY = 0.5
"""Share of a held-out rise from which it is called "mostly" format."""

EASY_OR_HARD = 0.5
"""Share of groups without gradient over the last third of the steps that explains a flat reward."""

Suggestion = tuple[int, str]
"""Urgency, 0 first, and text."""


def next_steps(stages: Sequence[StageVerdict], masks: Direction) -> list[str]:
    """Return suggestions for a run, the most urgent ones first.

    Args:
        stages: Verdicts on the training stages.
        masks: Direction of J&F over all GRPO stages.
    """
    suggestions: list[Suggestion] = []
    for stage in stages:
        suggestions += _for_stage(stage)
    rose = any("rose" in own_directions(s.facts) for s in stages if s.facts["kind"] == "grpo")
    if rose and masks in ("unclear", "fell"):
        text = (
            "Masks do not follow the reward. If the box IoU does, look at the segmenter "
            "(models.segmenter); if it does not, look at keyframes and boxes of the queries in "
            "the report. More clips narrow the interval (eval.benchmarks)."
        )
        suggestions.append((2, text))
    ranked = sorted(suggestions, key=lambda suggestion: suggestion[0])
    return list(dict.fromkeys(text for _, text in ranked))


def _for_stage(stage: StageVerdict) -> Iterator[Suggestion]:
    name, facts = stage.stage, stage.facts
    rules = _on_sft(name, facts) if facts["kind"] == "sft" else _on_grpo(name, facts)
    for urgency, text in (*rules, *_on_alerts(name, facts)):
        yield urgency, f"{name}: {text}"


def _on_sft(name: str, facts: Mapping[str, Any]) -> Iterator[Suggestion]:
    if at(facts, "loss", "direction") in ("rose", "unclear"):
        yield 2, f"the loss does not fall; lower train.{name}.learning_rate."
    if facts.get("overfits"):
        yield 2, f"it overfits; lower train.{name}.epochs, or add rows."


def _on_grpo(name: str, facts: Mapping[str, Any]) -> Iterator[Suggestion]:
    if not facts["steps"]:
        return
    key, ways = f"train.{name}", own_directions(facts)
    shares = [at(task, "form_share") or 0.0 for task in facts["heldout"].values()]
    if facts.get("form_alone") and at(facts, "sampled", "rest") == [0.0, 0.0, 0.0]:
        yield (
            0,
            "the reward pays for nothing but form; raise the weight of a component that reads the "
            "ground truth (components.accuracy.weight in the reward recipe).",
        )
    elif facts.get("form_alone") or max(shares, default=0.0) >= MOSTLY:
        yield (
            1,
            "most of the rise is format, which CoT-SFT teaches more cheaply; train SFT longer "
            "(train.<sft>.epochs), or lower components.format.weight in the reward recipe.",
        )
    if facts.get("forgotten"):
        tasks = " and ".join(task.upper() for task in facts["forgotten"])
        yield (
            1,
            f"{tasks} suffers; raise {key}.kl_loss_coef, or train both tasks in one stage "
            "(reward: joint).",
        )
    if "fell" in ways:
        yield 1, f"the reward fell; lower {key}.learning_rate."
    elif "rose" not in ways and "unclear" in ways:
        if (facts.get("zero_variance") or 0.0) >= EASY_OR_HARD:
            yield (
                1,
                f"most groups give no gradient; set {key}.dynamic_sampling: true, or choose "
                "prompts of medium difficulty.",
            )
        else:
            yield (
                2,
                f"no change of the reward is shown; raise {key}.steps, or measure more held-out "
                "prompts (eval.heldout_prompts).",
            )


def _on_alerts(name: str, facts: Mapping[str, Any]) -> Iterator[Suggestion]:
    key, texts = f"train.{name}", _ALERT_TEXTS
    for code in dict.fromkeys(facts.get("alerts", [])):
        if code in texts:
            yield 0 if code in facts["errors"] else 1, texts[code].format(key=key)


_ALERT_TEXTS = {
    "reward_collapse": "resume before the collapse with a lower {key}.learning_rate.",
    "kl_runaway": "raise {key}.kl_loss_coef, or lower {key}.learning_rate.",
    "zero_variance": "set {key}.dynamic_sampling: true, or choose other prompts.",
    "parse_failures": "teach the answer's form first: train SFT longer (train.<sft>.epochs).",
    "truncation": "raise {key}.max_response_length.",
    "format_only": "look at the rollouts for answers that are well formed but wrong.",
    "hang": "read the stacks that attempts.jsonl names; raise cluster.stall_timeout_s only if a "
    "step is slow.",
    "disk": "free space, or lower {key}.keep_checkpoints.",
}
