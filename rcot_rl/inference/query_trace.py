"""Input and output of the pipeline: a clip, and the trace of the answer to a query about it.

Also the last step of grounding, which needs no model: from a KTG response (eq. 5) to boxes and
points in source pixels. An object without a box is dropped; one without a point gets the centre of
its box; both are faults in the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from rcot_rl.protocol.grounding import parse_grounding
from rcot_rl.protocol.parser import parse_response
from rcot_rl.segmentation.duplicates import merge_duplicates


@dataclass(frozen=True)
class VideoClip:
    """A video whose frames are read on demand."""

    key: str
    """Identifies the video; seeds of samples depend on it."""
    n_frames: int
    read: Callable[[int], np.ndarray]
    """Frame index -> uint8 [H, W, 3] RGB in source resolution."""


StepTask = Literal["vdg", "kfg", "aks", "kfg_again", "ktg"]


@dataclass(frozen=True)
class TraceStep:
    """One request to the model and its response."""

    task: StepTask
    frame: int | None
    """The frame that was shown; None: frames of the video."""
    response: str
    frames: list[int] | None = None
    """The frames of the video that were shown; None: all, or `frame`."""
    prompt: str = ""
    option_probabilities: dict[str, float] | None = None
    """Probability of A and of B at the answer's first token; None if the task is not `aks`, or the
    response has no answer."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    tokens: int = 0
    """Generated tokens."""
    seconds: float = 0.0
    """In the engine, without the time in the queue."""


@dataclass
class Trace:
    """The responses and decisions that lead to one query's boxes. Frames are 0-based indices."""

    query: str
    description: str = ""
    keyframe: int = 0
    initial_keyframe: int = 0
    rounds: int = 0
    """Number of AKS judgements."""
    shown_frames: list[int] | None = None
    """Frames that VDG and KFG showed; None: the whole video, or neither ran."""
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


def merge_objects(trace: Trace, max_objects: int, duplicate_iou: float) -> None:
    """Drop near-identical and surplus objects from the trace; each is a fault.

    SAM2's memory and time grow with the number of objects, and a duplicate adds nothing to their
    union.
    """
    boxes = np.reshape(trace.boxes_canvas, (-1, 4))
    points = np.reshape(trace.points_canvas, (-1, 2))
    distinct = merge_duplicates(boxes, points, max(1, len(boxes)), duplicate_iou)
    kept = distinct[:max_objects]
    trace.faults += ["ktg:duplicate"] * (len(boxes) - len(distinct))
    trace.faults += ["ktg:too_many"] * (len(distinct) - len(kept))
    trace.boxes_canvas = [trace.boxes_canvas[i] for i in kept]
    trace.points_canvas = [trace.points_canvas[i] for i in kept]


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
    return {**values, **more, "steps": [vars(step) for step in trace.steps]}


def from_dict(values: Mapping[str, Any]) -> Trace:
    """Return the trace that `as_dict` gave, without its further keys."""
    names = {field.name for field in fields(Trace)} - {"steps"}
    steps = [TraceStep(**step) for step in values["steps"]]
    return Trace(**{name: values[name] for name in names}, steps=steps)
