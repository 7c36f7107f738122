"""Table of the same held-out prompts over the checkpoints, side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rcot_rl.monitoring.run_files.rollout_files import (
    Rollout,
    RolloutFrames,
    groups_of,
    read_rollout_file,
)
from rcot_rl.monitoring.run_files.run_reader import RunReader, as_mapping
from rcot_rl.monitoring.trackers.rollout_pictures import RolloutPictures, mask_maker
from rcot_rl.monitoring.trackers.rollout_tables import (
    Cell,
    PictureBudget,
    response_texts,
    shown_truth,
)
from rcot_rl.monitoring.trackers.tracker import DataTable, Value
from rcot_rl.prediction_layout import Way, heldout_responses_file
from rcot_rl.stats.spacing import evenly_spaced

PROMPTS = 4
"""Held-out prompts per prompt that `tracking.rollout_prompts` follows: this table is sent once."""


def heldout_responses(reader: RunReader) -> dict[str, Value]:
    """Return a table for each task: a row for each prompt, with every checkpoint's response.

    Prompts are evenly spaced over the held-out rows. The greedy responses are shown; the picture
    has the ground truth and each checkpoint's boxes and points as overlays.
    """
    recipe = reader.recipe
    if recipe is None:
        return {}
    tables: dict[str, Value] = {}
    for task, stage in recipe.heldout_stages.items():
        checkpoints = [str(name) for name in as_mapping(reader.heldout().get(task))]
        table = _table(reader, str(task), stage, checkpoints)
        if table is not None:
            tables[f"heldout_responses_{task}"] = table
    return tables


def _table(reader: RunReader, task: str, stage: str, checkpoints: list[str]) -> DataTable | None:
    assert reader.recipe is not None
    settings = reader.recipe.tracking
    greedy = {c: _by_prompt(reader, task, c, "greedy") for c in checkpoints}
    sampled = {c: _by_prompt(reader, task, c, "sampled") for c in checkpoints}
    answered = [c for c in checkpoints if greedy[c]]
    if not answered or not settings.rollout_prompts:
        return None
    prompts = list(greedy[answered[0]])
    chosen = evenly_spaced(len(prompts), PROMPTS * settings.rollout_prompts)
    frames = RolloutFrames(reader.root, stage, "val")
    pictures = RolloutPictures(frames, settings.picture_pixels, mask_maker(reader.recipe))
    masks = PictureBudget(settings.picture_masks)
    rows = []
    for prompt in (prompts[i] for i in chosen):
        each = {c: greedy[c][prompt][0] for c in answered if prompt in greedy[c]}
        first = next(iter(each.values()))
        picture = pictures.picture(first, each, masked=masks.take(first))
        row: list[Cell] = [prompt, first.video, frames.expression(first.index)]
        row += [shown_truth(first), picture]
        for checkpoint in answered:
            row += _cells(each.get(checkpoint), sampled[checkpoint].get(prompt, []))
        rows.append(row)
    details = ["reasoning", "answer", "reward", "sampled reward", "reasons"]
    sides = [f"{checkpoint}: {column}" for checkpoint in answered for column in details]
    return DataTable(["prompt", "video", "expression", "truth", "picture", *sides], rows)


def _by_prompt(
    reader: RunReader, task: str, checkpoint: str, way: Way
) -> Mapping[str, list[Rollout]]:
    file = heldout_responses_file(reader.root, task, checkpoint, way)
    return groups_of(read_rollout_file(file))


def _cells(response: Rollout | None, samples: list[Rollout]) -> list[Cell]:
    mean = float(np.mean([r.reward for r in samples])) if samples else None
    if response is None:
        return [None, None, None, mean, None]
    reasons = ", ".join(response.reasons)
    return [*response_texts(response), response.reward, mean, reasons]
