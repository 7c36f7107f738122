"""Input and output of the pipeline: a query about a clip, and the trace of its answer.

Also the last step of grounding, which needs no model: from a KTG response (eq. 5) to boxes and
points in source pixels. An object without a box is dropped; one without a point gets the centre of
its box; both are faults in the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rcot_rl.protocol.grounding import parse_grounding
from rcot_rl.protocol.parser import parse_response


@dataclass(frozen=True)
class VideoClip:
    """A video whose frames are read on demand."""

    key: str
    """Equal for equal videos: each key is described once."""
    n_frames: int
    read: Callable[[int], np.ndarray]
    """Frame index -> uint8 [H, W, 3] RGB in source resolution."""


@dataclass(frozen=True)
class VideoQuery:
    """One expression about one video."""

    clip: VideoClip
    text: str


@dataclass(frozen=True)
class TraceStep:
    """One response of the model."""

    task: Literal["vdg", "kfg", "aks", "kfg_again", "ktg"]
    frame: int | None
    """The frame that was shown; None: the whole video or a sample of it."""
    response: str


@dataclass
class Trace:
    """The responses and decisions that lead to one query's boxes. Frames are 0-based indices."""

    query: str
    description: str = ""
    keyframe: int = 0
    initial_keyframe: int = 0
    rounds: int = 0
    """Number of AKS judgements."""
    boxes_canvas: list[list[float]] = field(default_factory=list)
    """[x1, y1, x2, y2] as in the response, in pixels of the image canvas."""
    points_canvas: list[list[float]] = field(default_factory=list)
    boxes_source: list[list[float]] = field(default_factory=list)
    """Scaled to the keyframe's source resolution and clipped to it."""
    points_source: list[list[float]] = field(default_factory=list)
    steps: list[TraceStep] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """`task:code` of each fallback rule that was applied, in order."""


def read_objects(trace: Trace, response: str, canvas: int) -> None:
    """Add the boxes and points of a KTG response to the trace, in pixels of the canvas.

    A box completely outside the canvas is dropped. Other boxes are clipped later, by `to_source`.
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
    """Fill the source boxes and points of a trace whose keyframe has `height` x `width` pixels."""

    def scaled(values: list[float]) -> list[float]:
        sizes = (width, height, width, height)
        pairs = zip(values, sizes, strict=False)
        return [min(max(value, 0.0), canvas) * size / canvas for value, size in pairs]

    trace.boxes_source = [scaled(box) for box in trace.boxes_canvas]
    trace.points_source = [scaled(point) for point in trace.points_canvas]


def as_dict(trace: Trace, **more: Any) -> dict[str, Any]:
    """Return the trace as JSON values, with the keys of `more` before its steps."""
    values = {k: v for k, v in vars(trace).items() if k != "steps"}
    steps = [{"task": s.task, "frame": s.frame, "response": s.response} for s in trace.steps]
    return {**values, **more, "steps": steps}
