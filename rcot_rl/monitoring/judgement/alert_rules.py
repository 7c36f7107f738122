"""Rules that raise alerts while a stage trains (docs/alerts.md).

The rules read one line of metrics.jsonl after the other, and attempts.jsonl. A value counts as its
median over the last RECENT steps, so one odd step raises nothing, and a change shows after three
steps. Each rule has a bound at which its alert is raised and a weaker one at which it has cleared;
only then it can be raised again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from rcot_rl.monitoring.judgement.alert import Alert, AlertCode
from rcot_rl.monitoring.judgement.landmarks import (
    RewardFacts,
    component_keys,
    component_weights,
    reward_facts,
)
from rcot_rl.monitoring.run_files.run_reader import REASON, RunReader
from rcot_rl.recipe.training_section import GrpoStage
from rcot_rl.stats.json_values import is_number
from rcot_rl.stats.trend import FEWEST_STEPS, trend

RECENT = 5
"""Steps whose median is the current value."""

REFERENCE = 10
"""Steps before those whose median is the value to compare with; fewer near the start."""

COLLAPSE_SHARE = 0.2
"""Fall of the reward, as a share of its maximum: 1.2 of 6 or 0.6 of 3. The honest laptop runs fall
by at most 0.1, the paper's curves do not fall."""

COLLAPSE_NOISES = 4.0
"""The fall must also exceed this many standard deviations of a single step's mean. With a median of
five against the best median of ten, noise alone does not reach it in 10,000 steps."""

KL_HIGH = 0.5
"""KL loss per token at which the policy has left its reference. The laptop runs end near 0.03; with
a learning rate that was too high, the greedy reward fell at 0.2 already."""

KL_JUMP, KL_FLOOR = 5.0, 0.1
"""Growth within about fifteen steps that counts as a jump, and the KL from which it matters: near 0
every policy multiplies its KL quickly."""

ZERO_VARIANCE, ZERO_VARIANCE_CLEAR = 0.8, 0.6
"""Share of groups without gradient. At 0.8 a step learns from 3 of 16 prompts."""

UNPARSED, UNPARSED_CLEAR = 0.5, 0.3
"""Share of responses without a readable answer. A policy that starts without SFT may be there."""

UNPARSED_RISE = 0.25
"""Rise of that share above its lowest reference so far."""

TRUNCATED, TRUNCATED_CLEAR = 0.2, 0.1
"""Share of responses that end at the maximal length. They are cut before their answer."""

FORM_LEAST = 0.05
"""Smallest rise through form, as a share of the maximal reward: 0.3 of 6 or 0.15 of 3."""

FORM_ALONE, FORM_ALONE_CLEAR = 0.25, 0.5
"""The other components rise by less than this share of the rise through form, with 97.5 %
confidence. Format saturates first in honest runs too, so a missing proof that the rest rises is
not enough."""

FORM_EVERY, FORM_GROWTH = 5, 1.05
"""The rise through form is checked again after five steps, and 5 % more steps than before."""

ROOM = 0.25
"""GiB that a run needs at least, as the trainer does before a save."""

ROOM_FACTOR = 1.1
"""Space for a checkpoint, relative to the newest one, as the trainer demands before a save."""

UNREADABLE = (
    "answer_missing",
    "option_unknown",
    "keyframe_unknown",
    "answer_too_long",
    "json_invalid",
    "json_too_deep",
    "answer_not_a_list",
    "item_not_an_object",
)
"""Reason codes of an answer that cannot be read. A response has one of them at most, so their
shares add up."""

_NOISE_STEPS = 100
"""Steps whose differences measure the noise of a step, and that fit a function's weights."""


Value = Callable[[Mapping[str, Any]], float | None]
"""Reads a value of a step; None if the step does not have it."""


@dataclass(frozen=True)
class Reading:
    """What a rule finds at a step."""

    raises: bool
    clears: bool
    text: str
    level: Literal["warning", "error"] = "warning"


@dataclass(frozen=True)
class AlertRule:
    """A rule: its code, its title, and the function that reads the steps so far."""

    code: AlertCode
    title: str
    read: Callable[[StepHistory], Reading | None]
    """Returns None if the steps do not have the rule's values."""


class StepHistory:
    """The steps of a GRPO stage so far, as the rules need them.

    Args:
        facts: Maximum and weights of the stage's reward.
        max_tokens: Maximal length of a response; None if unknown.
    """

    def __init__(self, facts: RewardFacts, max_tokens: int | None) -> None:
        self.facts = facts
        self.max_tokens = max_tokens
        self.lines: list[Mapping[str, Any]] = []
        self.best_reward = -math.inf
        """Highest reference of the reward so far."""
        self.least_unparsed = math.inf
        """Lowest reference of the unparsed share so far."""
        self.next_form_check = FEWEST_STEPS

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a step; values that no rule reads are dropped."""
        self.lines.append(_read_values(line))
        reward, unparsed = self.reference(_reward), self.reference(unparsed_share)
        if reward is not None:
            self.best_reward = max(self.best_reward, reward)
        if unparsed is not None:
            self.least_unparsed = min(self.least_unparsed, unparsed)

    def recent(self, value: Value) -> float | None:
        """Return the median of a value over the last RECENT steps; None if one lacks it."""
        return _median(self.lines[-RECENT:], value, RECENT)

    def reference(self, value: Value) -> float | None:
        """Return the median of a value over the up to REFERENCE steps before the recent ones."""
        return _median(self.lines[-RECENT - REFERENCE : -RECENT], value, RECENT)

    @property
    def noise(self) -> float:
        """Standard deviation of one step's mean reward, from differences of successive steps."""
        values = [v for line in self.lines[-_NOISE_STEPS:] if (v := _reward(line)) is not None]
        jumps = [abs(b - a) for a, b in pairwise(values)]
        # |difference| of two normal values has the median 0.6745 * sqrt(2) * sigma
        return median(jumps) / 0.954 if jumps else 0.0

    @property
    def scale(self) -> float:
        """Maximum of the reward, or else the largest absolute mean of a reference."""
        if self.facts.maximum is not None:
            return self.facts.maximum
        return abs(self.best_reward) if math.isfinite(self.best_reward) else 0.0

    def form_and_rest(self) -> tuple[list[float], list[float]] | None:
        """Return the weighted sums of the form and of the other components at each step."""
        weights = component_weights(self.lines[-_NOISE_STEPS:], self.facts)
        if weights is None:
            return None
        names = component_keys(self.lines[-1])
        form = [n for n in names if self.facts.is_form(n)]
        if not form:
            return None
        sums: tuple[list[float], list[float]] = ([], [])
        for line in self.lines:
            values = {n: line.get(key) for n, key in names.items()}
            if not all(map(is_number, values.values())):
                continue
            for into, chosen in zip(sums, (form, names.keys() - set(form)), strict=True):
                into.append(sum(weights[n] * float(values[n] or 0.0) for n in chosen))
        return sums if sums[0] else None


class AlertWatch:
    """Raises the alerts of a stage step by step.

    Feed it all lines of metrics.jsonl in order, also those of earlier attempts, whose alerts the
    caller may drop. A line of an earlier step replaces that step and all later ones, as in a
    resumed attempt.
    """

    def __init__(self, reader: RunReader, stage: str) -> None:
        self._reader, self._stage = reader, stage
        settings = reader.recipe.train.get(stage) if reader.recipe is not None else None
        self._max_tokens = settings.max_response_length if isinstance(settings, GrpoStage) else None
        self._facts = reward_facts(reader, stage)
        self._history = StepHistory(self._facts, self._max_tokens)
        self._active: set[AlertCode] = set()
        self._raised: set[tuple[AlertCode, int]] = set()
        self._attempts = reader.root / stage / "attempts.jsonl"
        self._attempts_size = 0
        self._failures = 0

    def update(self, line: Mapping[str, Any]) -> list[Alert]:
        """Return the alerts that are new with this step: failed attempts before it, then its own.

        Args:
            line: The next line of metrics.jsonl.
        """
        alerts, step = self.new_failures(), line.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            return alerts
        last = self._history.lines[-1]["step"] if self._history.lines else 0
        if step <= last:
            self._rewind(step)
        new = [a for a in self._add(line) if (a.code, a.step) not in self._raised]
        self._raised |= {(alert.code, alert.step) for alert in new}
        return alerts + new

    def new_failures(self) -> list[Alert]:
        """Return an alert for each attempt that failed since the last call."""
        try:
            size = self._attempts.stat().st_size
        except OSError:
            return []
        if size == self._attempts_size:
            return []
        self._attempts_size = size
        failures = self._reader.stage(self._stage).failures
        new, self._failures = failures[self._failures :], len(failures)
        return [_failure_alert(self._stage, row) for row in new]

    def _rewind(self, step: int) -> None:
        kept = [line for line in self._history.lines if line["step"] < step]
        self._history = StepHistory(self._facts, self._max_tokens)
        self._active = set()
        for line in kept:
            self._add(line)

    def _add(self, line: Mapping[str, Any]) -> list[Alert]:
        self._history.add(line)
        alerts = []
        for rule in RULES:
            reading = rule.read(self._history)
            if reading is None:
                continue
            if rule.code in self._active:
                if reading.clears:
                    self._active.discard(rule.code)
            elif reading.raises:
                self._active.add(rule.code)
                step = line["step"]
                alerts.append(
                    Alert(rule.code, reading.level, self._stage, step, rule.title, reading.text)
                )
        return alerts


def alerts_of(reader: RunReader, stage: str) -> list[Alert]:
    """Return all alerts of a stage so far, oldest first: a pure function of the run's files."""
    watch = AlertWatch(reader, stage)
    alerts = watch.new_failures()
    for line in reader.metrics(stage):
        alerts += watch.update(line)
    return sorted(alerts, key=lambda alert: alert.step)


def unparsed_share(line: Mapping[str, Any]) -> float | None:
    """Return the share of a step's responses without a readable answer.

    None if the step lists no reason codes at all: then the reward gives none, or the run is of an
    earlier version.
    """
    if not any(key.startswith(REASON) for key in line):
        return None
    shares = (line.get(REASON + code) for code in UNREADABLE)
    return float(sum(share for share in shares if is_number(share)))


_READ = frozenset(
    {
        "step",
        "reward/mean",
        "actor/kl_loss",
        "group/zero_variance_fraction",
        "response_length/clip_ratio",
        "response_length/max",
        "disk/free_gib",
        "checkpoint/size_gib",
        *(REASON + code for code in UNREADABLE),
    }
)


def _read_values(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the rules read of a line, which has a hundred keys."""
    values = {key: line[key] for key in (*_READ, *component_keys(line).values()) if key in line}
    if unparsed_share(line) is not None:
        values.setdefault(REASON + UNREADABLE[0], 0.0)
    return values


def _number(key: str) -> Value:
    def read(line: Mapping[str, Any]) -> float | None:
        value = line.get(key)
        return float(value) if is_number(value) else None

    return read


def _kl(line: Mapping[str, Any]) -> float | None:
    value = line.get("actor/kl_loss")
    if isinstance(value, float) and not math.isfinite(value):
        return math.inf
    return float(value) if is_number(value) else None


_reward = _number("reward/mean")
_zero_variance = _number("group/zero_variance_fraction")


def _median(lines: list[Mapping[str, Any]], value: Value, fewest: int) -> float | None:
    """Return the median of a value; None unless at least `fewest` lines have it."""
    values = [v for line in lines if (v := value(line)) is not None]
    return median(values) if len(values) >= fewest else None


def _collapse(steps: StepHistory) -> Reading | None:
    now, best = steps.recent(_reward), steps.best_reward
    if now is None or not math.isfinite(best):
        return None
    fall = best - now
    bound = max(COLLAPSE_SHARE * steps.scale, COLLAPSE_NOISES * steps.noise)
    text = (
        f"The reward fell from {best:.2f} to {now:.2f}, more than {bound:.2f}. Look at the "
        "rollouts; resume from an earlier checkpoint with a lower learning_rate."
    )
    return Reading(fall > bound > 0, fall < bound / 2, text, "error")


def _kl_runaway(steps: StepHistory) -> Reading | None:
    now, before = steps.recent(_kl), steps.reference(_kl)
    if now is None:
        return None
    jump = before is not None and now >= KL_FLOOR and now >= KL_JUMP * before
    grown = f", {KL_JUMP:g} times the {before:.3f} of the steps before" if jump else ""
    text = (
        f"The KL loss is {now:.3f}{grown or f', above {KL_HIGH:g}'}: the policy leaves its "
        "reference. Lower learning_rate or raise kl_loss_coef."
    )
    return Reading(now >= KL_HIGH or jump, now < KL_FLOOR, text)


def _no_variance(steps: StepHistory) -> Reading | None:
    share = steps.recent(_zero_variance)
    if share is None:
        return None
    reward, maximum = steps.recent(_reward), steps.facts.maximum
    cause = "They are too easy or too hard: look at the rollouts."
    if reward is not None and maximum is not None:
        if reward >= 0.9 * maximum:
            cause = f"The reward is {reward:.2f} of {maximum:g}: the prompts are too easy."
        elif reward <= 0.5 * maximum:
            cause = f"The reward is {reward:.2f} of {maximum:g}: the prompts are too hard."
    text = (
        f"{100 * share:.0f} % of the groups have equal rewards and give no gradient (bound "
        f"{100 * ZERO_VARIANCE:.0f} %). {cause}"
    )
    return Reading(share >= ZERO_VARIANCE, share < ZERO_VARIANCE_CLEAR, text)


def _unparsed(steps: StepHistory) -> Reading | None:
    share = steps.recent(unparsed_share)
    if share is None:
        return None
    risen = share - steps.least_unparsed >= UNPARSED_RISE
    bound = (
        f"{100 * steps.least_unparsed:.0f} % before"
        if risen and share < UNPARSED
        else f"bound {100 * UNPARSED:.0f} %"
    )
    text = (
        f"{100 * share:.0f} % of the responses have no readable answer ({bound}). Train CoT-SFT "
        "longer, or look at the rollouts for what replaced the answer."
    )
    cleared = share < UNPARSED_CLEAR and share - steps.least_unparsed < UNPARSED_RISE / 2
    return Reading(share >= UNPARSED or risen, cleared, text)


def _truncation(steps: StepHistory) -> Reading | None:
    limit = steps.max_tokens
    if limit is None:
        return None

    def cut(line: Mapping[str, Any]) -> float | None:
        share, longest = line.get("response_length/clip_ratio"), line.get("response_length/max")
        if not is_number(share) or not is_number(longest):
            return None
        # verl counts the responses that are as long as the step's longest
        return float(share) if longest >= limit else 0.0

    share = steps.recent(cut)
    if share is None:
        return None
    text = (
        f"{100 * share:.0f} % of the responses are cut at max_response_length {limit} (bound "
        f"{100 * TRUNCATED:.0f} %). Raise it, or look at the rollouts for endless reasoning."
    )
    return Reading(share >= TRUNCATED, share < TRUNCATED_CLEAR, text)


def _format_only(steps: StepHistory) -> Reading | None:
    n = len(steps.lines)
    if n < steps.next_form_check:
        return None
    steps.next_form_check = max(n + FORM_EVERY, int(FORM_GROWTH * n))
    sums = steps.form_and_rest()
    if sums is None:
        return None
    form, rest = (trend(values).change for values in sums)
    if form.low is None or rest.high is None:
        return None
    rises = form.low > 0 and form.mean >= FORM_LEAST * steps.scale
    text = (
        f"The reward rises through format alone: format {form.mean:+.2f}, everything else "
        f"{rest.mean:+.2f} (at most {rest.high:+.2f}), from the first to the last third of the "
        "steps. Look at the rollouts for answers that are well formed but wrong."
    )
    return Reading(
        rises and rest.high < FORM_ALONE * form.mean,
        not rises or rest.high >= FORM_ALONE_CLEAR * form.mean,
        text,
    )


def _disk(steps: StepHistory) -> Reading | None:
    line = steps.lines[-1]
    free, size = line.get("disk/free_gib"), line.get("checkpoint/size_gib")
    if not is_number(free):
        return None
    needed = max(ROOM, ROOM_FACTOR * size if is_number(size) else 0.0)
    text = (
        f"{free:.2f} GiB are free on the run's disk, and the next checkpoint needs "
        f"{needed:.2f}. Free space, or lower keep_checkpoints."
    )
    level: Literal["warning", "error"] = "error" if free < needed else "warning"
    return Reading(free < 2 * needed, free >= 3 * needed, text, level)


RULES = (
    AlertRule("reward_collapse", "Reward collapsed", _collapse),
    AlertRule("kl_runaway", "KL runs away", _kl_runaway),
    AlertRule("zero_variance", "Groups without variance", _no_variance),
    AlertRule("parse_failures", "Unreadable answers", _unparsed),
    AlertRule("truncation", "Responses cut off", _truncation),
    AlertRule("format_only", "Only format improves", _format_only),
    AlertRule("disk", "Disk nearly full", _disk),
)
"""Rules on the steps of a stage. Hangs and restarts come from attempts.jsonl."""


def _failure_alert(stage: str, row: Mapping[str, Any]) -> Alert:
    """Return the alert of a row of attempts.jsonl (`FailureVerdict`)."""
    cause, step = str(row.get("cause", "unknown")), row.get("step")
    code: AlertCode = "hang" if cause == "hang" else "restart"
    retried = bool(row.get("retry"))
    what = "hung" if code == "hang" else f"failed ({cause})"
    title = f"Attempt {what}" + (", retried" if retried else "")
    text = str(row.get("text") or f"{row.get('attempt')} {what}.")
    level: Literal["warning", "error"] = "error" if code == "hang" or not retried else "warning"
    return Alert(code, level, stage, step if isinstance(step, int) else 0, title, text)
