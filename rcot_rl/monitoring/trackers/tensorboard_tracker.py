"""TensorBoard: event files in RUN/tracking/tensorboard/<stage>, by TensorBoard's own writer.

torch is not imported. A stage is written again from its start whenever it is opened: TensorBoard
shows all event files of a folder as one run, so repeated steps would be drawn twice.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image, ImageDraw
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rcot_rl.monitoring.judgement.alert import Alert
from rcot_rl.monitoring.trackers.tracker import (
    DataTable,
    Distribution,
    Picture,
    TrackedStage,
    Tracker,
    Value,
)
from rcot_rl.recipe.tracking_section import TRACKING

FOLDER = "tensorboard"
_COLOURS = ("lime", "red", "cyan", "yellow", "magenta")
"""Colours of the groups of boxes, in order."""
_POINT = 3
"""Radius of a point in pixels."""


class TensorBoardTracker(Tracker):
    """Writes a run's stages as event files."""

    label: ClassVar[str] = "TensorBoard"

    def __init__(self) -> None:
        self._writer: EventFileWriter | None = None
        self._folder = Path()
        self._step = 0

    def open(self, stage: TrackedStage) -> int:
        """Start the stage's event file again."""
        self._folder = stage.run / TRACKING / FOLDER
        shutil.rmtree(self._folder / stage.stage, ignore_errors=True)
        self._writer = EventFileWriter(str(self._folder / stage.stage))
        self._step = 0
        config = json.dumps(stage.config, indent=1, default=str)
        self._add(0, [_text("config", f"```\n{config}\n```")])
        return 0

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Write the values of a step; a table is written as Markdown and its pictures."""
        self._step = step
        parts = [p for key, v in values.items() if key != "time" for p in _summaries(key, v)]
        moment = values.get("time")
        self._add(step, parts, moment if isinstance(moment, int | float) else None)

    def summarize(self, values: Mapping[str, Value]) -> None:
        """Write values of the whole stage at its last step."""
        for key, value in values.items():
            self._add(self._step, _summaries(f"summary/{key}", value))

    def alert(self, alert: Alert) -> None:
        """Write an alert as text."""
        self._add(alert.step, [_text(f"alerts/{alert.code}", f"**{alert.title}**: {alert.text}")])

    def close(self, state: Literal["running", "done", "failed"]) -> None:
        """Flush the event file and close it."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def where(self) -> str:
        """Return the command that shows the files."""
        return f"tensorboard --logdir {self._folder}"

    def _add(self, step: int, values: list[Summary.Value], moment: float | None = None) -> None:
        """Write values of a step that was made at `moment`; None: now."""
        assert self._writer is not None
        if values:
            summary = Summary(value=values)
            wall_time = time.time() if moment is None else moment
            self._writer.add_event(Event(wall_time=wall_time, step=step, summary=summary))


def _summaries(key: str, value: Value) -> list[Summary.Value]:
    """Return what TensorBoard shows of a value."""
    if isinstance(value, Picture):
        return [_image(key, value)]
    if isinstance(value, Distribution):
        return [_histogram(key, value)]
    if isinstance(value, DataTable):
        return _table(key, value)
    if isinstance(value, str):
        return [_text(key, value)]
    return [Summary.Value(tag=key, simple_value=float(value))]


def _text(key: str, text: str) -> Summary.Value:
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode(errors="backslashreplace")])
    return Summary.Value(tag=key, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)


def _histogram(key: str, value: Distribution) -> Summary.Value:
    counts, edges = np.asarray(value.counts, float), np.asarray(value.edges, float)
    centres = (edges[:-1] + edges[1:]) / 2
    proto = HistogramProto(
        min=edges[0],
        max=edges[-1],
        num=counts.sum(),
        sum=float(counts @ centres),
        sum_squares=float(counts @ centres**2),
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )
    return Summary.Value(tag=key, histo=proto)


def _table(key: str, table: DataTable) -> list[Summary.Value]:
    """Return a Markdown table, and its pictures."""
    pictures: list[Summary.Value] = []

    def cell(value: Any) -> str:
        if isinstance(value, Picture):
            pictures.append(_image(f"{key}/{len(pictures)}", value))
            return f"picture {len(pictures) - 1}"
        text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
        return " ".join(text.replace("|", "\\|").split())

    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    markdown = "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)
    return [_text(key, markdown), *pictures]


def _image(key: str, picture: Picture) -> Summary.Value:
    """Return a picture with its boxes and points drawn, and masks tinted."""
    image = picture.image.copy()
    for mask in picture.masks.values():
        image[mask] = image[mask] // 2 + np.array([0, 90, 0], np.uint8)
    drawn = Image.fromarray(image)
    draw = ImageDraw.Draw(drawn)
    for index, boxes in enumerate(picture.boxes.values()):
        colour = _COLOURS[index % len(_COLOURS)]
        for x1, y1, x2, y2 in (box.corners for box in boxes):
            if (x1, y1) == (x2, y2):
                corners = (x1 - _POINT, y1 - _POINT, x1 + _POINT, y1 + _POINT)
                draw.ellipse(corners, fill=colour)
            else:
                draw.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=colour)
    buffer = io.BytesIO()
    drawn.save(buffer, "png")
    height, width = image.shape[:2]
    encoded = buffer.getvalue()
    proto = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
    return Summary.Value(tag=key, image=proto)
