"""What goes into the pipeline and what comes out: a query about a clip, and the trace of an answer.

Also the last step of grounding, which needs no model: from a KTG response (eq. 5) to boxes and
points in source pixels. An object without a box is dropped; one without a point gets the centre of
its box; each is a fault in the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rcot_rl.protocol.grounding import parse_grounding
from rcot_rl.protocol.parser import parse_response


@dataclass(frozen=True)
class Clip:
    """A video whose frames are read when they are needed."""

    key: str
    """Equal for equal videos: its description is made once."""

    n_frames: int
    read: Callable[[int], np.ndarray]
    """Frame index -> uint8 [H, W, 3] RGB, in the source's resolution."""


@dataclass(frozen=True)
class Query:
    """One sentence about one video."""

    clip: Clip
    text: str


@dataclass(frozen=True)
class Step:
    """One answer of the model."""

    task: str
    """vdg, kfg, aks, kfg_again or ktg."""

    frame: int | None
    """The frame that was shown; None for the whole video or a sample of it."""

    response: str


@dataclass
class Trace:
    """All that was said on the way to the boxes of one query. Frames are 0-based indices."""

    query: str
    description: str = ""
    keyframe: int = 0
    initial_keyframe: int = 0
    rounds: int = 0
    """Judgements that AKS made."""

    boxes_canvas: list[list[float]] = field(default_factory=list)
    """[x1, y1, x2, y2] as the model gave them, in pixels of the image canvas."""

    points_canvas: list[list[float]] = field(default_factory=list)
    boxes_source: list[list[float]] = field(default_factory=list)
    """Scaled to the keyframe's own resolution and clipped to it."""

    points_source: list[list[float]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """`task:code`, one for each rule of last resort that was used."""


def read_objects(trace: Trace, response: str, canvas: int) -> None:
    """Put the boxes and points of a KTG response into the trace, in pixels of the canvas.

    A box is clipped to the canvas only by `to_source`; one wholly outside it is dropped here.
    """
    grounding = parse_grounding(parse_response(response).answer)
    trace.faults += [f"ktg:{fault}" for fault in grounding.faults]
    for item in grounding.items:
        trace.faults += [f"ktg:{fault}" for fault in item.faults]
        if item.box is None:
            continue
        x1, y1, x2, y2 = item.box
        if x2 <= 0 or y2 <= 0 or x1 >= canvas or y1 >= canvas:
            trace.faults.append("ktg:box_outside")
            continue
        point = item.point
        if point is not None and not (0 <= point[0] <= canvas and 0 <= point[1] <= canvas):
            trace.faults.append("ktg:point_outside")
            point = None
        if point is None:
            left, top, right, bottom = (min(max(v, 0.0), float(canvas)) for v in item.box)
            point = ((left + right) / 2, (top + bottom) / 2)
        trace.boxes_canvas.append(list(item.box))
        trace.points_canvas.append(list(point))


def to_source(trace: Trace, canvas: int, height: int, width: int) -> None:
    """Fill the source boxes and points of a keyframe of `height` x `width` pixels."""

    def scaled(values: list[float]) -> list[float]:
        sizes = (width, height, width, height)
        pairs = zip(values, sizes, strict=False)
        return [min(max(value, 0.0), canvas) * size / canvas for value, size in pairs]

    trace.boxes_source = [scaled(box) for box in trace.boxes_canvas]
    trace.points_source = [scaled(point) for point in trace.points_canvas]


def as_dict(trace: Trace, **more: Any) -> dict[str, Any]:
    """The trace as JSON values, with further keys."""
    values = {k: v for k, v in vars(trace).items() if k != "steps"}
    steps = [{"task": s.task, "frame": s.frame, "response": s.response} for s in trace.steps]
    return {**values, **more, "steps": steps}
