"""Ground truths: checked once, before anything is scored. A broken one is the data's fault.

A value may be given as itself or as a JSON text of itself, as verl's rows store it. Faults raise
InputError with the key; the caller adds file and line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from rcot_rl.errors import InputError
from rcot_rl.protocol.grounding import Box, Point
from reward_fns.registry import Settings

KEY = "ground_truth"
_SEG_ZERO_BOX = re.compile(r"<box>\((\d{1,9}),(\d{1,9})\),\((\d{1,9}),(\d{1,9})\)</box>")
_SEG_ZERO_POINTS = re.compile(r"<points>\((\d{1,9}),(\d{1,9})\),\((\d{1,9}),(\d{1,9})\)</points>")


@dataclass(frozen=True)
class Objects:
    """The targets of a KTG row, in pixels of the canvas."""

    boxes: tuple[Box, ...]
    points: tuple[Point | None, ...]
    raw: list[dict[str, Any]]
    """As given: the lineage's arithmetic depends on which numbers are integers."""

    without_point: int | None = None
    """The first object that has no point."""

    def require_points(self) -> None:
        """Raise InputError unless every object has a point."""
        if self.without_point is not None:
            raise InputError("missing", key=f"{KEY}[{self.without_point}].point_2d")


@dataclass(frozen=True)
class BoxAndPoints:
    """The target of a Seg-Zero row: one box, two points, integers in pixels of the canvas."""

    box: tuple[int, int, int, int]
    points: tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Frames:
    """What a row that asks for a keyframe is judged by: one entry for each frame that was shown."""

    ids: tuple[int, ...]
    """What the answer calls them; 0, 1, … for kfg."""
    areas: tuple[float, ...]
    """Of the targets' union; in any unit, alike for all frames."""
    boxes: tuple[tuple[Box, ...], ...]
    """veason: of the targets that the frame shows, on the canvas; empty for kfg."""


def read_ground_truth(value: Any, settings: Settings) -> str | Objects | BoxAndPoints | Frames:
    """The ground truth of a row of `settings.task`, checked. Raises InputError."""
    if settings.task == "aks":
        return _option(value, settings.options)
    if settings.task == "ktg":
        return _objects(value)
    if settings.task in ("kfg", "veason"):
        return _frames(value, boxes=settings.task == "veason")
    return _box_and_points(value)


def _option(value: Any, options: tuple[str, ...]) -> str:
    for candidate in (value, _from_json(value)):
        if isinstance(candidate, str) and candidate in options:
            return candidate
    raise InputError(f"must be one of the options {', '.join(options)}", key=KEY)


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _objects(value: Any) -> Objects:
    entries = _from_json(value)
    if not isinstance(entries, list):
        raise InputError('must be a list of {"bbox_2d": […], "point_2d": […]}', key=KEY)
    boxes: list[Box] = []
    points: list[Point | None] = []
    for i, entry in enumerate(entries):
        key = f"{KEY}[{i}]"
        if not isinstance(entry, dict):
            raise InputError("must be an object", key=key)
        if "bbox_2d" not in entry:
            raise InputError("missing", key=f"{key}.bbox_2d")
        x1, y1, x2, y2 = _numbers(entry["bbox_2d"], 4, f"{key}.bbox_2d")
        # a side of length 0 is what rounding to the canvas can make of a thin object
        if x1 > x2 or y1 > y2:
            raise InputError("must have x1 <= x2 and y1 <= y2", key=f"{key}.bbox_2d")
        boxes.append((x1, y1, x2, y2))
        point = entry.get("point_2d")
        if point is None:
            points.append(None)
        else:
            x, y = _numbers(point, 2, f"{key}.point_2d")
            points.append((x, y))
    lacking = points.index(None) if None in points else None
    return Objects(tuple(boxes), tuple(points), entries, lacking)


def _numbers(value: Any, n: int, key: str) -> tuple[float, ...]:
    if isinstance(value, (list, tuple)) and len(value) == n and all(map(_is_coordinate, value)):
        return tuple(map(float, value))
    raise InputError(f"must be a list of {n} finite numbers", key=key)


def _is_coordinate(value: Any) -> bool:
    # no canvas reaches 1e9, and nan is not within it either
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e9


def _frames(value: Any, boxes: bool) -> Frames:
    entry = _from_json(value)
    wanted = ("frames", "areas", "boxes") if boxes else ("areas",)
    if not isinstance(entry, dict):
        raise InputError(f"must be an object with {', '.join(wanted)}", key=KEY)
    for key in wanted:
        if not isinstance(entry.get(key), list) or len(entry[key]) != len(entry[wanted[0]]):
            raise InputError("must be a list with an entry a frame", key=f"{KEY}.{key}")
    areas = _numbers(entry["areas"], len(entry["areas"]), f"{KEY}.areas")
    if not areas or min(areas) < 0:
        raise InputError("must be numbers that are not negative, one at least", key=f"{KEY}.areas")
    if not boxes:
        return Frames(tuple(range(len(areas))), areas, ())
    ids = entry["frames"]
    if not all(type(i) is int for i in ids) or len(set(ids)) != len(ids):
        raise InputError("must be different whole numbers", key=f"{KEY}.frames")
    return Frames(
        tuple(ids),
        areas,
        tuple(_boxes(b, f"{KEY}.boxes[{k}]") for k, b in enumerate(entry["boxes"])),
    )


def _boxes(value: Any, key: str) -> tuple[Box, ...]:
    if not isinstance(value, list):
        raise InputError("must be a list of boxes", key=key)
    found = []
    for number, box in enumerate(value):
        x1, y1, x2, y2 = _numbers(box, 4, f"{key}[{number}]")
        if x1 > x2 or y1 > y2:
            raise InputError("must have x1 <= x2 and y1 <= y2", key=f"{key}[{number}]")
        found.append((x1, y1, x2, y2))
    return tuple(found)


def _box_and_points(value: Any) -> BoxAndPoints:
    text = value if isinstance(value, str) else ""
    if text.startswith('"'):
        text = str(_from_json(text))
    box, points = _SEG_ZERO_BOX.search(text), _SEG_ZERO_POINTS.search(text)
    if box is None or points is None:
        raise InputError(
            "must be '<box>(x1,y1),(x2,y2)</box><points>(x,y),(x,y)</points>' with integers",
            key=KEY,
        )
    x1, y1, x2, y2 = map(int, box.groups())
    ax, ay, bx, by = map(int, points.groups())
    return BoxAndPoints((x1, y1, x2, y2), ((ax, ay), (bx, by)))
