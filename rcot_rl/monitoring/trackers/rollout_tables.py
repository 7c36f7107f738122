"""Tables of a GRPO stage's rollouts: which steps, which responses, and what a row shows.

Three tables, so that a person can read what a curve cannot show:

- `rollouts`: the best and the worst response to some prompts of the step.
- `rollouts_best_and_worst`: the step's group with the highest mean, with the lowest mean and with
  the widest spread; each row has the group's best and worst response side by side (only one if
  their rewards are equal).
- `rollouts_same_prompts`: the prompts of the first step, whenever an epoch repeats them. A stage
  that sees each prompt once has none: the held-out prompts are then compared over checkpoints
  (`heldout_responses`).

What a step shows depends on the files and the recipe alone, not on when the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from rcot_rl.monitoring.run_files.rollout_files import (
    Rollout,
    RolloutFrames,
    groups_of,
    read_rollouts,
)
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.trackers.rollout_pictures import RolloutPictures, mask_maker
from rcot_rl.monitoring.trackers.tracker import DataTable, Picture
from rcot_rl.protocol.parser import parse_response
from rcot_rl.recipe.tracking_section import TrackingSection

BEST, WORST = "best", "worst"
_MOST_CHARS = 4000
"""Characters of a text that a table shows."""

Cell = float | int | str | bool | Picture | None


class RolloutTables:
    """Makes the tables of one stage."""

    def __init__(self, reader: RunReader, stage: str) -> None:
        self._reader, self._stage = reader, stage
        self._settings = reader.recipe.tracking if reader.recipe else TrackingSection()

    def tables(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, DataTable]:
        """Return the tables of a step with its rollouts."""
        groups = list(groups_of(rollouts).values())
        if not groups:
            return {}
        names = component_names(rollouts)
        masks = PictureBudget(self._settings.picture_masks)
        chosen = groups[: self._settings.rollout_prompts]
        rows = [row for group in chosen for row in self._rows(step, group, names, masks)]
        tables = {"rollouts_best_and_worst": self._sides(step, groups, names, masks)}
        if rows:
            tables["rollouts"] = DataTable(_columns(names), rows)
        return tables

    def same_prompts(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, DataTable]:
        """Return the table of the first step's prompts, if the step has one of them again."""
        groups = [g for g in groups_of(rollouts).values() if g[0].index in self._first_prompts]
        if step == 1 or not groups:
            return {}
        names = component_names(rollouts)
        masks = PictureBudget(self._settings.picture_masks)
        rows = [row for group in groups for row in self._rows(step, group, names, masks)]
        return {"rollouts_same_prompts": DataTable(_columns(names), rows)}

    @cached_property
    def _first_prompts(self) -> set[int]:
        first = read_rollouts(self._reader.root / self._stage, 1)
        indices = dict.fromkeys(r.index for r in first if r.index is not None)
        return set(list(indices)[: self._settings.rollout_prompts])

    @cached_property
    def _frames(self) -> RolloutFrames:
        return RolloutFrames(self._reader.root, self._stage)

    @cached_property
    def _pictures(self) -> RolloutPictures:
        segmenter = mask_maker(self._reader.recipe)
        return RolloutPictures(self._frames, self._settings.picture_pixels, segmenter)

    def _rows(
        self, step: int, group: Sequence[Rollout], names: Sequence[str], masks: PictureBudget
    ) -> Iterable[list[Cell]]:
        """Yield the row of the best and of the worst response, or one if all rewards are equal."""
        best, worst = best_and_worst(group)
        ends = {BEST: best} if best.reward == worst.reward else {BEST: best, WORST: worst}
        for name, one in ends.items():
            yield [
                step,
                name if len(ends) > 1 else "all equal",
                *self._prompt(one),
                self._pictures.picture(one, masked=masks.take(one)),
                *response_texts(one),
                shown_truth(one),
                *_score(one, names),
            ]

    def _sides(
        self,
        step: int,
        groups: Sequence[Sequence[Rollout]],
        names: Sequence[str],
        masks: PictureBudget,
    ) -> DataTable:
        means = [float(np.mean([r.reward for r in group])) for group in groups]
        spreads = [float(np.std([r.reward for r in group])) for group in groups]
        chosen = {
            "highest mean": int(np.argmax(means)),
            "lowest mean": int(np.argmin(means)),
            "widest spread": int(np.argmax(spreads)),
        }
        rows = []
        for label, k in chosen.items():
            best, worst = best_and_worst(groups[k])
            same = best.reward == worst.reward
            ends = {BEST: best} if same else {BEST: best, WORST: worst}
            # episodes end on different frames: the picture shows that of the best one
            picture = self._pictures.picture(best, ends, masked=masks.take(best))
            both = [[*response_texts(one), *_score(one, names)] for one in ends.values()]
            both += [[None] * len(both[0])] if same else []
            rows.append(
                [
                    step,
                    label,
                    *self._prompt(best),
                    shown_truth(best),
                    means[k],
                    spreads[k],
                    picture,
                    *both[0],
                    *both[1],
                ]
            )
        details = ["reasoning", "answer", *_score_columns(names)]
        sides = [f"{end}: {column}" for end in (BEST, WORST) for column in details]
        head = ["step", "group", "prompt", "video", "expression", "truth", "mean", "spread"]
        return DataTable([*head, "picture", *sides], rows)

    def _prompt(self, rollout: Rollout) -> tuple[str, str, str]:
        prompt = rollout.prompt_id if rollout.index is None else str(rollout.index)
        return prompt, rollout.video, self._frames.expression(rollout.index)


class PictureBudget:
    """Counts the pictures of a table that still get a mask."""

    def __init__(self, left: int) -> None:
        self._left = left

    def take(self, rollout: Rollout) -> bool:
        """Return True if a picture of this response gets a mask."""
        if rollout.task != "ktg" or not self._left:
            return False
        self._left -= 1
        return True


def best_and_worst(group: Sequence[Rollout]) -> tuple[Rollout, Rollout]:
    """Return the responses with the highest and the lowest reward; ties go to the first one."""
    return max(group, key=lambda r: r.reward), min(group, key=lambda r: r.reward)


def component_names(rollouts: Iterable[Rollout]) -> list[str]:
    """Return the components of the responses, in the order in which they appear."""
    return list(dict.fromkeys(name for r in rollouts for name in r.components))


def shown_text(text: str | None) -> str:
    """Return a text, shortened to what a table shows."""
    text = text or ""
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]} …"


def shown_truth(rollout: Rollout) -> str:
    """Return the ground truth: the option, or boxes and points."""
    if rollout.task == "aks":
        return str(rollout.truth)
    objects = [
        f"box {_numbers(box)}" + ("" if point is None else f" point {_numbers(point)}")
        for box, point in rollout.true_objects
    ]
    return shown_text("; ".join(objects))


def _numbers(values: Iterable[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def response_texts(rollout: Rollout) -> tuple[str, str]:
    """Return the reasoning and the answer."""
    parsed = parse_response(rollout.response)
    # a malformed response is shown as it is
    thought = rollout.response if parsed.thought is None else parsed.thought
    return shown_text(thought), shown_text(rollout.answer)


def _score(rollout: Rollout, names: Sequence[str]) -> list[Cell]:
    components = [rollout.components.get(name) for name in names]
    reasons = ", ".join(rollout.reasons)
    return [rollout.reward, *components, reasons, rollout.advantage, rollout.tokens]


def _score_columns(names: Sequence[str]) -> list[str]:
    columns = [f"component/{name}" for name in names]
    return ["reward", *columns, "reasons", "advantage", "tokens"]


def _columns(names: Sequence[str]) -> list[str]:
    head = ["step", "response", "prompt", "video", "expression", "picture", "reasoning", "answer"]
    return [*head, "truth", *_score_columns(names)]
