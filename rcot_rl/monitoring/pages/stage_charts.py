"""The charts of a training stage, from its metrics, rollouts and held-out rewards.

`CHARTS` says what each chart means and what to do when it looks wrong; docs/monitoring.md repeats
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rcot_rl.monitoring.judgement.landmarks import (
    PAPER,
    component_keys,
    component_maxima,
    max_reward,
    trained_tasks,
)
from rcot_rl.monitoring.pages.curves import (
    COLOURS,
    ChartMark,
    Series,
    dot_chart,
    how_drawn,
    line_chart,
)
from rcot_rl.monitoring.pages.page import details, missing, section, text
from rcot_rl.monitoring.run_files.rollout_figures import group_figures
from rcot_rl.monitoring.run_files.rollout_files import read_rollouts, rollout_steps
from rcot_rl.monitoring.run_files.run_reader import REASON, RunReader
from rcot_rl.recipe.training_section import GrpoStage
from rcot_rl.stats.json_values import at, is_number

Lines = Sequence[Mapping[str, Any]]


class ChartText(NamedTuple):
    """How to read a chart."""

    title: str
    meaning: str
    remedy: str


CHARTS = {
    "loss": ChartText(
        "Loss",
        "Cross-entropy per token of the traces. It should fall and level off.",
        "A validation loss that rises again means overfitting: train fewer epochs. A loss that "
        "does not fall: check learning_rate, and the traces with rcot data show.",
    ),
    "rate": ChartText(
        "Learning rate",
        "The schedule that was applied: warm-up, then decay.",
        "A flat line at 0 means that the warm-up is longer than the stage.",
    ),
    "reward": ChartText(
        "Mean reward",
        "What training optimizes. Each step has other prompts, so read the trend. The dots are the "
        "held-out reward of the checkpoints before and after the stage.",
        "If it does not rise, look at groups without gradient first. If it rises and the held-out "
        "reward does not, or only format rises, the policy games the reward: read rollouts.",
    ),
    "components": ChartText(
        "Components, % of their maximum",
        "Which part of the reward pays. Format saturates first; accuracy is the task.",
        "Format below 90 % at the start: more CoT-SFT. Accuracy that falls while format rises: "
        "lower the weight of format in the reward recipe.",
    ),
    "reasons": ChartText(
        "Lost points by reason, % of responses",
        "How many responses lose points for each reason; one response can have several.",
        "A reason that grows shows what the policy unlearns. rcot score explain shows single "
        "responses.",
    ),
    "variance": ChartText(
        "Groups without gradient, %",
        "Groups whose responses all have the same reward: their advantages are 0. Too easy: all "
        "are right. Too hard: all are wrong.",
        "Above 60 % most of the step is wasted. Too easy: harder prompts. Too hard: a softer "
        "reward, more responses per group, or more CoT-SFT.",
    ),
    "length": ChartText(
        "Response length, tokens",
        "Mean length of the responses.",
        "A sudden rise, or a fall to a few tokens, hints at a gamed reward. A length near "
        "max_response_length truncates answers.",
    ),
    "kl": ChartText(
        "KL to the reference",
        "Distance of the policy from the reference. Slow growth that levels off is normal.",
        "A jump or steady acceleration: lower learning_rate or raise kl_loss_coef, and resume from "
        "the checkpoint before it.",
    ),
    "length_reward": ChartText(
        "Reward against length",
        "One dot per step; later steps are darker. A healthy run moves upwards.",
        "Dots that move along a slanted line: the reward pays for length, not for the task.",
    ),
    "truncation": ChartText(
        "Truncated responses, %",
        "Responses that reached max_response_length and lost their answer.",
        "Above 5 %: raise max_response_length, or add a length term to the reward.",
    ),
    "entropy": ChartText(
        "Entropy",
        "How undecided the policy is about the next token.",
        "Near 0 the responses of a group are alike: raise temperature or kl_loss_coef.",
    ),
    "gradient": ChartText(
        "Gradient norm",
        "Norm of the gradient before clipping.",
        "Isolated peaks are harmless. Steady growth: lower learning_rate.",
    ),
    "seconds": ChartText(
        "Seconds per step",
        "Wall-clock time of rollouts, rewards and the update.",
        "A jump: look at timing_s/* and memory_gib/* in metrics.jsonl (System metrics).",
    ),
}


def stage_section(reader: RunReader, stage: str) -> str:
    """Return the section of a training stage: its main charts, and the others to unfold."""
    title = f"Training: {text(stage, 60)}"
    lines = [line for line in reader.metrics(stage) if is_number(line.get("step"))]
    if not lines:
        return section(title, missing(f"{stage}/metrics.jsonl (training curves)"))
    draw = _Charts(reader, stage, lines)
    kinds: tuple[list[str], list[str]] = (
        (["loss", "rate", "gradient"], [])
        if not any("reward/mean" in line for line in lines)
        else (
            ["reward", "components", "reasons", "variance", "length", "kl"],
            ["length_reward", "truncation", "entropy", "gradient", "seconds"],
        )
    )
    shown, more = ([(kind, draw.chart(kind)) for kind in part] for part in kinds)
    absent = [CHARTS[kind].title for kind, chart in (*shown, *more) if not chart]
    return section(
        title,
        f"<small>{len(lines)} steps. {how_drawn(len(lines), bool(draw.errors))}"
        f"{draw.paper_note()}</small>",
        _grid([chart for _, chart in shown]),
        _more([CHARTS[kind].title for kind, chart in more if chart], [c for _, c in more if c]),
        missing(f"{'; '.join(absent)} (not in metrics.jsonl)") if absent else "",
    )


def _grid(charts: Sequence[str]) -> str:
    return f'<div class="grid-of charts">{"".join(charts)}</div>'


def _more(titles: Sequence[str], charts: Sequence[str]) -> str:
    if not charts:
        return ""
    names = ", ".join(title.partition(",")[0].lower() for title in titles)
    return details(f"More charts: {text(names)}", _grid(charts))


def curve(
    lines: Lines, key: str, name: str, scale: float = 1, errors: Sequence[float] = ()
) -> Series | None:
    """Return the curve of a key, or None if no step has it.

    Args:
        lines: Steps of metrics.jsonl.
        key: Key of the values; a step without it is a gap.
        name: Name of the curve.
        scale: Factor of the values.
        errors: Standard error at each line, before scaling.
    """
    values = [line[key] * scale if is_number(line.get(key)) else math.nan for line in lines]
    if all(map(math.isnan, values)):
        return None
    return Series(name, [line["step"] for line in lines], values, [e * scale for e in errors])


def reward_errors(lines: Lines, groups: int) -> list[float]:
    """Return the standard error of each step's mean reward, with prompts as the sample.

    The variance between the groups' means is the total variance minus the variance inside groups.

    Args:
        lines: Steps of metrics.jsonl.
        groups: Number of groups (prompts) of a step.

    Returns:
        One value per line, nan where a figure is missing; empty if all are.
    """
    errors = []
    for line in lines:
        total, inside = line.get("reward/std"), line.get("group/reward_std_mean", 0.0)
        if groups > 1 and is_number(total) and is_number(inside):
            between = max(0.0, float(total or 0) ** 2 - float(inside) ** 2)
            errors.append(math.sqrt(between / (groups - 1)))
        else:
            errors.append(math.nan)
    return [] if all(map(math.isnan, errors)) else errors


class _Charts:
    """Draws the charts of one stage; a chart without values is empty text."""

    def __init__(self, reader: RunReader, stage: str, lines: Lines) -> None:
        self._reader, self._stage, self._lines = reader, stage, lines
        self._tasks = trained_tasks(reader, stage)
        self._maximum = max_reward(reader, stage)
        self.errors = reward_errors(lines, self._groups())
        """Standard error of each step's mean reward; empty if unknown."""

        self._paper = PAPER.get(self._tasks[0]) if len(self._tasks) == 1 else None

    def chart(self, kind: str) -> str:
        special: dict[str, Callable[[ChartText], str]] = {
            "reward": self._reward,
            "components": self._components,
            "reasons": self._reasons,
            "variance": self._variance,
            "length_reward": self._length_reward,
        }
        words = CHARTS[kind]
        if kind in special:
            return special[kind](words)
        keys, scale = _KEYS[kind]
        curves = [curve(self._lines, key, name, scale) for key, name in keys.items()]
        if kind == "rate":  # a schedule has no noise
            curves = [one and replace(one, style="smooth") for one in curves]
        marks = []
        if kind == "length" and self._paper:
            marks = [ChartMark(self._paper.response_tokens, "paper: about")]
        span = (0.0, 100.0) if scale == 100 else None
        return self._lines_chart(words, curves, marks, span)

    def paper_note(self) -> str:
        """Return the remark on the marked figures of the paper; empty without any."""
        if self._paper is None:
            return ""
        return (
            " Dashed: the reward's maximum, and the paper's curves (3- and 7-billion-parameter "
            "policies; a tiny policy's levels are not comparable with theirs)."
        )

    def _lines_chart(
        self,
        words: ChartText,
        curves: Sequence[Series | None],
        marks: Sequence[ChartMark] = (),
        span: tuple[float, float] | None = None,
    ) -> str:
        present = [one for one in curves if one is not None]
        if not present:
            return ""
        return line_chart(words.title, present, words.meaning, words.remedy, marks, span)

    def _reward(self, words: ChartText) -> str:
        reward = curve(self._lines, "reward/mean", "sampled in training", errors=self.errors)
        if reward is None:
            return ""
        marks = []
        if self._maximum is not None:
            marks.append(ChartMark(self._maximum, "maximum"))
        if self._paper and self._maximum == self._paper.max_reward:
            marks.append(ChartMark(self._paper.start_reward, "paper starts at"))
        return self._lines_chart(words, [reward, *self._heldout()], marks)

    def _heldout(self) -> list[Series]:
        """Return the held-out reward before and after the stage, at its first and last step."""
        before, rewards = self._reader.start_of(self._stage), self._reader.heldout()
        curves = []
        for task in self._tasks:
            means = [at(rewards, task, str(c), "sampled", "mean") for c in (before, self._stage)]
            if all(map(is_number, means)):
                ends = [self._lines[0]["step"], self._lines[-1]["step"]]
                name = "held-out" if len(self._tasks) == 1 else f"held-out {task}"
                curves.append(Series(name, ends, means, style="dots"))
        return curves

    def _groups(self) -> int:
        recipe = self._reader.recipe
        settings = recipe.train.get(self._stage) if recipe is not None else None
        return settings.prompts_per_step if isinstance(settings, GrpoStage) else 0

    def _components(self, words: ChartText) -> str:
        maxima = component_maxima(self._reader, self._stage)
        keys = dict(
            sorted({k: v for line in self._lines for k, v in component_keys(line).items()}.items())
        )
        shown = list(keys.items())[:COLOURS]
        if not all(maxima.get(name, 0) > 0 for name, _ in shown):
            plain = words._replace(title="Components, before weights")
            return self._lines_chart(plain, [curve(self._lines, key, name) for name, key in shown])
        curves = [curve(self._lines, key, name, 100 / maxima[name]) for name, key in shown]
        return self._lines_chart(words, curves, span=(0, 100))

    def _reasons(self, words: ChartText) -> str:
        keys = sorted({key for line in self._lines for key in line if key.startswith(REASON)})
        totals = {key: sum(_value(line, key) for line in self._lines) for key in keys}
        ranked = sorted(keys, key=lambda key: -totals[key])
        curves = [
            curve(self._lines, key, key.removeprefix(REASON).replace("_", " "), 100)
            for key in ranked[:COLOURS]
        ]
        rest = ranked[COLOURS:]
        if rest:
            sums = [100 * sum(_value(line, key) for key in rest) for line in self._lines]
            steps = [line["step"] for line in self._lines]
            curves.append(Series("all others, summed", steps, sums, colour="soft"))
        return self._lines_chart(words, curves)

    def _variance(self, words: ChartText) -> str:
        folder = self._reader.root / self._stage
        split = []
        for step in rollout_steps(folder):
            figures = group_figures(read_rollouts(folder, step), self._maximum)
            if figures:
                split.append({"step": step} | figures)
        curves = [
            curve(self._lines, "group/zero_variance_fraction", "all", 100),
            curve(split, "group/too_hard_fraction", "too hard", 100),
            curve(split, "group/too_easy_fraction", "too easy", 100),
        ]
        return self._lines_chart(words, curves, span=(0, 100))

    def _length_reward(self, words: ChartText) -> str:
        pairs = [
            (line.get("response_length/mean"), line.get("reward/mean")) for line in self._lines
        ]
        known = [(x, y) for x, y in pairs if is_number(x) and is_number(y)]
        if not known:
            return ""
        lengths, rewards = zip(*known, strict=True)
        dots = Series("steps", lengths, rewards)
        axes = ("mean length, tokens", "mean reward")
        return dot_chart(words.title, dots, axes, words.meaning, words.remedy)


_KEYS: dict[str, tuple[dict[str, str], float]] = {
    "loss": ({"train/loss": "training", "val/loss": "validation"}, 1),
    "rate": ({"train/lr": "rate"}, 1),
    "length": ({"response_length/mean": "mean"}, 1),
    "kl": ({"actor/kl_loss": "KL"}, 1),
    "truncation": ({"response_length/clip_ratio": "truncated"}, 100),
    "entropy": ({"actor/entropy": "entropy"}, 1),
    "gradient": ({"actor/grad_norm": "norm", "train/grad_norm": "norm"}, 1),
    "seconds": ({"timing_s/step": "step"}, 1),
}
"""Chart -> names of its keys in metrics.jsonl, and their factor."""


def _value(line: Mapping[str, Any], key: str) -> float:
    value = line.get(key)
    return float(value) if is_number(value) else 0.0
