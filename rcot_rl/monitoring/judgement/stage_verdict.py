"""Judge one training stage: sentences by stated rules, and the values behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rcot_rl.monitoring.judgement.alert import Alert
from rcot_rl.monitoring.judgement.alert_rules import FORM_ALONE, alerts_of
from rcot_rl.monitoring.judgement.changes import (
    Direction,
    as_facts,
    direction,
    heldout_change,
    interval_text,
    masks_between,
    number_text,
)
from rcot_rl.monitoring.judgement.landmarks import (
    RewardFacts,
    component_keys,
    component_weights,
    reward_facts,
    trained_tasks,
)
from rcot_rl.monitoring.run_files.run_reader import RunReader, StageView
from rcot_rl.prediction_layout import WAYS
from rcot_rl.stats.intervals import Interval
from rcot_rl.stats.json_values import at, is_number
from rcot_rl.stats.trend import trend

ALONE_HELD_OUT = 0.9
"""Share of the held-out rise from which it is called a rise through format alone."""


OVERFIT = 0.02
"""Relative rise of the validation loss above its minimum that counts as overfitting."""


@dataclass(frozen=True)
class StageVerdict:
    """What is known about one training stage."""

    stage: str
    sentences: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    """The values behind the sentences, as JSON values."""

    alerts: list[Alert] = field(default_factory=list)
    """All alerts of the stage."""


def judge_sft(reader: RunReader, view: StageView) -> StageVerdict:
    """Judge an SFT stage: did the losses fall, and does it overfit?"""
    steps, name = reader.metrics(view.name), view.name
    facts: dict[str, Any] = {"kind": "sft", "steps": len(steps)}
    if not steps:
        return StageVerdict(name, [_not_started(view)], facts, alerts_of(reader, name))
    sentences = []
    losses = _values(steps, "train/loss")
    if losses:
        loss = trend(losses)
        facts["loss"] = as_facts(loss.before, loss.after, loss.change)
        way = direction(loss.change)
        levels = f"{loss.before:.3f} to {loss.after:.3f}{_thirds(losses)}"
        if way == "unknown":
            sentences.append(f"Too few steps to judge the training loss: {levels}.")
        else:
            verb = {"rose": "rose", "fell": "fell"}.get(way, "did not clearly fall")
            sentences.append(f"The training loss {verb} from {levels}.")
    validation = _values(steps, "val/loss")
    if len(validation) < 2:
        sentences.append(
            "Whether it overfits is unknown: fewer than two validation losses are logged."
        )
    else:
        least, last = min(validation), validation[-1]
        overfits = last > (1 + OVERFIT) * least
        facts["validation"] = {"first": validation[0], "least": least, "last": last}
        facts["overfits"] = overfits
        verb = "fell" if last < validation[0] else "rose"
        sentences.append(
            f"The validation loss {verb} from {validation[0]:.3f} to {last:.3f}"
            + (f", but was {least:.3f} before: it overfits." if overfits else ".")
        )
    return _with_attempts(reader, view, sentences, facts)


def judge_grpo(
    reader: RunReader,
    view: StageView,
    heldout: Mapping[str, Any],
    scores: Mapping[str, Any],
) -> StageVerdict:
    """Judge a GRPO stage: rewards, the components they come from, held-out rewards and masks.

    Args:
        reader: The run.
        view: The stage.
        heldout: The run's held-out rewards.
        scores: The run's results by benchmark.
    """
    steps, name = reader.metrics(view.name), view.name
    facts: dict[str, Any] = {"kind": "grpo", "steps": len(steps)}
    if not steps:
        return StageVerdict(name, [_not_started(view)], facts, alerts_of(reader, name))
    known = reward_facts(reader, name)
    tasks = trained_tasks(reader, name)
    start = reader.start_of(name)
    sentences = [
        *_sampled(steps, known, facts),
        *_heldout(heldout, name, start, tasks, known, facts),
        *_masks(scores, name, start, facts),
    ]
    shares = _values(steps, "group/zero_variance_fraction")
    if shares:
        facts["zero_variance"] = trend(shares).after
    return _with_attempts(reader, view, sentences, facts)


def _sampled(
    steps: Sequence[Mapping[str, Any]], known: RewardFacts, facts: dict[str, Any]
) -> list[str]:
    """Judge the rewards of the training rollouts, and through which component they changed."""
    rewards = _values(steps, "reward/mean")
    if not rewards:
        return ["The sampled reward is unknown: metrics.jsonl has no reward/mean."]
    reward = trend(rewards)
    way = direction(reward.change)
    facts["sampled"] = as_facts(reward.before, reward.after, reward.change)
    if way == "unknown":
        return [f"Whether the sampled reward rose is unknown: only {len(rewards)} steps."]
    of = f" of {known.maximum:g}" if known.maximum is not None else ""
    change = f"{number_text(reward.before, reward.after)} {interval_text(reward.change, 2)}"
    levels = f"from {reward.before:.2f} to {reward.after:.2f}{of}{_thirds(rewards)}"
    sentences = [f"The sampled reward {_VERBS[way]} {levels}: {change}{_NOT_SHOWN.get(way, '')}."]
    by_form = _by_component(steps, known)
    if by_form is None:
        sentences.append("Through which component is unknown: the reward declares no weights.")
        return sentences
    shares, form, rest = by_form
    facts["sampled"] |= {"components": shares, "form": list(form[:3]), "rest": list(rest[:3])}
    if way == "rose":
        alone = form.mean > 0 and rest.high is not None and rest.high < FORM_ALONE * form.mean
        facts["form_alone"] = alone
        text = f"By component (weighted): {_shares_text(shares)}"
        if alone:
            text += "; it rises through format alone"
        elif rest.low is not None and rest.low <= 0 < form.mean:
            text += (
                f"; without the format {rest.mean:+.2f} {interval_text(rest, 2)}, no change shown"
            )
        sentences.append(text + ".")
    return sentences


_VERBS: Mapping[Direction, str] = {"rose": "rose", "fell": "fell", "unclear": "went"}


_NOT_SHOWN: Mapping[Direction, str] = {"unclear": ", no change shown"}


def _by_component(
    steps: Sequence[Mapping[str, Any]], known: RewardFacts
) -> tuple[dict[str, float], Interval, Interval] | None:
    """Return the weighted change of each component, and of form and all others together.

    None if the weights are unknown.
    """
    weights = component_weights(steps, known)
    if weights is None:
        return None
    keys = component_keys(steps[-1])
    rows = [s for s in steps if all(is_number(s.get(key)) for key in keys.values())]
    parts = {n: np.array([weights[n] * s[key] for s in rows]) for n, key in keys.items()}
    nothing = np.zeros(len(rows))
    form = sum((v for n, v in parts.items() if known.is_form(n)), nothing)
    rest = sum((v for n, v in parts.items() if not known.is_form(n)), nothing)
    shares = {n: trend(values).change.mean for n, values in parts.items()}
    return shares, trend(form).change, trend(rest).change


def _shares_text(shares: Mapping[str, float]) -> str:
    """Return the parts of a change, the largest first: `+0.46 from format, +0.23 from accuracy`."""
    largest = sorted(shares.items(), key=lambda item: -abs(item[1]))
    return ", ".join(f"{value:+.2f} from {name}" for name, value in largest)


def _heldout(
    heldout: Mapping[str, Any],
    stage: str,
    start: str | None,
    tasks: Sequence[str],
    known: RewardFacts,
    facts: dict[str, Any],
) -> list[str]:
    """Judge the rewards on held-out prompts, of the stage's tasks and of the others."""
    measured = {t: r for t, r in heldout.items() if at(r, stage) and at(r, str(start))}
    facts["heldout"] = {}
    sentences, others = [], []
    for task, results in measured.items():
        before, after = results[str(start)], results[stage]
        changes = {way: _paired(before, after, way) for way in WAYS}
        facts["heldout"][task] = {
            way: as_facts(at(before, way, "mean"), at(after, way, "mean"), change)
            for way, change in changes.items()
            if change is not None
        }
        facts["heldout"][task]["own"] = own = task in tasks or not tasks
        words = [_way_text(before, after, way, c) for way, c in changes.items() if c is not None]
        sampled = direction(changes["sampled"])
        if not own and sampled == "fell":
            others.append(f"The other task suffers: held-out {task.upper()} {words[0]}.")
            facts.setdefault("forgotten", []).append(task)
        if not own or not words:
            continue
        verdict = _agreement(facts, sampled)
        sentences.append(f"Held-out reward ({task.upper()}){verdict}: {'; '.join(words)}.")
        if sampled == "rose" and (text := _heldout_shares(before, after, known, facts, task)):
            sentences.append(text)
    if not sentences:
        sentences = [
            "The held-out reward is unknown: it was not measured before and after the stage, on "
            "the same prompts."
        ]
    return sentences + others


def _paired(before: Any, after: Any, way: str) -> Interval | None:
    """Return the paired change over prompts; None unless both have the same prompts."""
    means = at(before, way, "mean"), at(after, way, "mean")
    if not all(map(is_number, means)) or at(before, "prompts") != at(after, "prompts"):
        return None
    return heldout_change(before[way], after[way])


def _agreement(facts: Mapping[str, Any], sampled: Direction) -> str:
    """Return whether held-out rewards agree with those of the training rollouts."""
    trained = at(facts, "sampled", "direction")
    if trained == "rose":
        return {"rose": " agrees", "fell": " disagrees"}.get(sampled, " does not confirm it")
    return ""


def _way_text(before: Any, after: Any, way: str, change: Interval) -> str:
    first, last = at(before, way, "mean"), at(after, way, "mean")
    shown = (
        f"{way} {first:.2f} to {last:.2f}, {number_text(first, last)} {interval_text(change, 2)}"
    )
    return shown + (", no change shown" if direction(change) == "unclear" else "")


def _heldout_shares(
    before: Any, after: Any, known: RewardFacts, facts: dict[str, Any], task: str
) -> str:
    """Return through which component the held-out sampled reward rose; empty if unknown."""
    first, last = (at(r, "sampled", "components") for r in (before, after))
    if known.weights is None or not isinstance(first, dict) or not isinstance(last, dict):
        return ""
    names = [n for n in known.weights if is_number(first.get(n)) and is_number(last.get(n))]
    shares = {n: known.weights[n] * (last[n] - first[n]) for n in names}
    total = sum(shares.values())
    if not names or total <= 0:
        return ""
    facts["heldout"][task]["sampled"]["components"] = shares
    form = sum(value for n, value in shares.items() if known.is_form(n))
    facts["heldout"][task]["form_share"] = form / total
    if form / total >= ALONE_HELD_OUT:
        facts["form_alone"] = True
    elif form / total < 1 - FORM_ALONE:
        facts["form_alone"] = False  # the held-out rewards show what the noisy steps do not
    return f"Of this rise: {_shares_text(shares)}."


def _masks(
    scores: Mapping[str, Any], stage: str, start: str | None, facts: dict[str, Any]
) -> list[str]:
    """Judge whether J&F changed from the checkpoint that the stage starts from."""
    masks = masks_between(scores, start, stage)
    way = direction(masks.change if masks is not None else None)
    facts["masks"] = {"direction": way}
    if masks is None or way == "unknown":
        return ["Whether masks follow is unknown: J&F was not measured before and after the stage."]
    facts["masks"] |= as_facts(masks.before, masks.after, masks.change)
    verb = {"rose": "Masks follow", "fell": "Masks got worse"}.get(way, "Masks: no change shown")
    sentences = [f"{verb}: J&F {masks.text}, {masks.change.n} clips."]
    steps = []
    for key, label in _PIPELINE.items():
        levels = [_mean_over_benchmarks(scores, str(name), key) for name in (start, stage)]
        if levels[0] is not None and levels[1] is not None:
            facts["masks"][key] = levels
            steps.append(f"{label} {levels[0]:.1f} % to {levels[1]:.1f} %")
    return [*sentences, f"Before the masks: {', '.join(steps)}."] if steps else sentences


_PIPELINE: Mapping[str, str] = {
    "keyframe_area_ratio": "area ratio of the keyframe",
    "box_iou": "box IoU",
}
"""Key of a result -> what it measures of the steps before the segmenter."""


def _mean_over_benchmarks(scores: Mapping[str, Any], checkpoint: str, key: str) -> float | None:
    """Return the mean of a figure over the benchmarks; None if one of them lacks it."""
    results = [at(result, "checkpoints", checkpoint) for result in scores.values()]
    figures = [at(result, key) for result in results if result is not None]
    if not figures or not all(map(is_number, figures)):
        return None
    return sum(figures) / len(figures)


def _with_attempts(
    reader: RunReader,
    view: StageView,
    sentences: list[str],
    facts: dict[str, Any],
) -> StageVerdict:
    """Return the stage's verdict, with restarts and alerts added."""
    failures = view.failures
    if failures:
        causes = Counter(str(row.get("cause", "unknown")) for row in failures)
        listed = ", ".join(
            f"{_CAUSES.get(c, c)}{f' ({n} times)' if n > 1 else ''}" for c, n in causes.items()
        )
        at_steps = ", ".join(str(row.get("step", "?")) for row in failures)
        plural = "" if len(failures) == 1 else "s"
        sentences.append(
            f"{len(failures)} failed attempt{plural}: {listed}; after step {at_steps}."
        )
        facts["failures"] = dict(causes)
    interrupted = view.attempts - len(failures) - 1
    if interrupted > 0:
        plural = "" if interrupted == 1 else "s"
        sentences.append(f"Interrupted and resumed {interrupted} time{plural}.")
        facts["interrupted"] = interrupted
    if view.state in ("stopped", "running"):
        state = "in progress" if view.state == "running" else "not finished"
        sentences.append(f"The stage is {state}.")
    alerts = alerts_of(reader, view.name)
    facts["alerts"] = [alert.code for alert in alerts]
    on_steps = [alert for alert in alerts if alert.code not in ("hang", "restart")]
    sentences += [f"Alert at step {a.step}: {a.title.lower()}. {a.text}" for a in on_steps]
    facts["errors"] = [a.code for a in on_steps if a.level == "error"]
    return StageVerdict(view.name, sentences, facts, alerts)


_CAUSES: Mapping[str, str] = {
    "host": "a lost host",
    "hang": "a hang",
    "deadline": "the deadline",
    "memory": "out of memory",
    "disk": "a full disk",
    "read-only": "a read-only file system",
    "input": "invalid input",
    "incomplete": "an early end",
    "signal": "a signal",
    "error": "an error",
}


def own_directions(facts: Mapping[str, Any]) -> list[Direction]:
    """Return the directions of a stage's own held-out rewards, or else of its training rollouts."""
    tasks = [t for t in (facts.get("heldout") or {}).values() if t.get("own")]
    ways = [way for t in tasks if (way := at(t, "sampled", "direction")) is not None]
    return ways or [at(facts, "sampled", "direction") or "unknown"]


def _not_started(view: StageView) -> str:
    return "The stage has not started." if view.state == "pending" else "No step is logged yet."


def _values(steps: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(v) for step in steps if is_number(v := step.get(key))]


def _thirds(values: Sequence[float]) -> str:
    return f" (first and last {max(1, len(values) // 3)} of {len(values)} steps)"
