"""Table of sample rows of a run's shard sets, with the ground truth drawn on their frames."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from data_pipelines.verify.show import Shown, read_shown
from rcot_rl.errors import InputError
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.trackers.rollout_pictures import TRUE, scaled_picture
from rcot_rl.monitoring.trackers.rollout_tables import shown_text
from rcot_rl.monitoring.trackers.tracker import DataTable, Picture, Value
from rcot_rl.recipe.tracking_section import TrackingSection

logger = logging.getLogger(__name__)

ROWS_PER_SET = 8
_COLUMNS = ["set", "row", "task", "target", "dataset", "video", "expression", "picture", "truth"]
_COLUMNS += ["prompt", "response"]


def data_samples(reader: RunReader) -> dict[str, Value]:
    """Return a few rows of each shard set, of all kinds in turn; empty without shards."""
    settings = reader.recipe.tracking if reader.recipe else TrackingSection()
    rows = []
    for folder in sorted((reader.root / "shards").glob("*/manifest.json")):
        shard = next(iter(sorted(folder.parent.glob("train-*.parquet"))), None)
        for shown in _samples(shard) if shard is not None else []:
            rows.append(_row(folder.parent.name, shown, settings.picture_pixels))
    return {"data_samples": DataTable(_COLUMNS, rows)} if rows else {}


def _samples(shard: Path) -> list[Shown]:
    try:
        return read_shown(shard, limit=ROWS_PER_SET, varied=True)
    except InputError as error:
        logger.warning("no sample rows: %s", error)
        return []


def _row(name: str, shown: Shown, longest: int) -> list[float | int | str | bool | Picture | None]:
    info, truth = shown.info, shown.truth
    is_option = isinstance(truth, str)
    objects = [
        (tuple(map(float, item["bbox_2d"])), tuple(map(float, item["point_2d"])))
        for item in ([] if isinstance(truth, str) else truth)
    ]
    picture = scaled_picture(
        np.asarray(shown.image),
        longest,
        objects={TRUE: objects},  # type: ignore[dict-item]  # checked by `read_shown`
        caption=f"truth {truth}" if is_option else f"objects: {len(truth)}",
    )
    facts = [str(info.get(k, "")) for k in ("task", "target", "dataset", "video", "expression")]
    texts = [str(truth) if is_option else json.dumps(truth), shown.prompt, shown.response]
    return [name, shown.number, *facts, picture, *(shown_text(text) for text in texts)]
