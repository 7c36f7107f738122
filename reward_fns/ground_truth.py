"""Ground truths: checked once, before anything is scored.

A value is given as it is or as JSON text, as verl's rows store it. A malformed one is a defect of
the data and raises InputError with the key; the caller adds file and line.
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
    """Targets of a KTG row, in pixels of the canvas."""

    boxes: tuple[Box, ...]
    points: tuple[Point | None, ...]
    raw: list[dict[str, Any]]
    """Objects as given: VisionReasoner's arithmetic depends on which numbers are integers."""
    without_point: int | None = None
    """Index of the first object without a point."""

    def require_points(self) -> None:
        """Raise InputError if an object has no point."""
        if self.without_point is not None:
            raise InputError("missing", key=f"{KEY}[{self.without_point}].point_2d")


@dataclass(frozen=True)
class BoxAndPoints:
    """Target of a Seg-Zero row: one box and two points, integers in pixels of the canvas."""

    box: tuple[int, int, int, int]
    points: tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class KeyframeTruth:
    """Ground truth of a row that asks for a keyframe: one entry for each frame shown."""

    ids: tuple[int, ...]
    """Ids that the answer uses; 0, 1, … for kfg."""
    areas: tuple[float, ...]
    """Areas of the targets' union, in one unit for all frames."""
    boxes: tuple[tuple[Box, ...], ...]
    """veason: boxes of the visible targets, on the canvas; empty for kfg."""


def read_ground_truth(
    value: Any, settings: Settings
) -> str | Objects | BoxAndPoints | KeyframeTruth:
    """Check and return the ground truth of a row of `settings.task`. Raises InputError."""
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
        boxes.append(_box(entry["bbox_2d"], f"{key}.bbox_2d"))
        point = entry.get("point_2d")
        if point is None:
            points.append(None)
        else:
            x, y = _numbers(point, 2, f"{key}.point_2d")
            points.append((x, y))
    without_point = points.index(None) if None in points else None
    return Objects(tuple(boxes), tuple(points), entries, without_point)


def _box(value: Any, key: str) -> Box:
    x1, y1, x2, y2 = _numbers(value, 4, key)
    # rounding to the canvas can give a thin object a side of length 0
    if x1 > x2 or y1 > y2:
        raise InputError("must have x1 <= x2 and y1 <= y2", key=key)
    return x1, y1, x2, y2


def _numbers(value: Any, n: int, key: str) -> tuple[float, ...]:
    if isinstance(value, (list, tuple)) and len(value) == n and all(map(_is_coordinate, value)):
        return tuple(map(float, value))
    raise InputError(f"must be a list of {n} finite numbers", key=key)


def _is_coordinate(value: Any) -> bool:
    # no canvas reaches 1e9; NaN fails the comparison too
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e9


def _frames(value: Any, boxes: bool) -> KeyframeTruth:
    entry = _from_json(value)
    keys = ("frames", "areas", "boxes") if boxes else ("areas",)
    if not isinstance(entry, dict):
        raise InputError(f"must be an object with {', '.join(keys)}", key=KEY)
    for key in keys:
        if not isinstance(entry.get(key), list) or len(entry[key]) != len(entry[keys[0]]):
            raise InputError("must be a list with one entry per frame", key=f"{KEY}.{key}")
    areas = _numbers(entry["areas"], len(entry["areas"]), f"{KEY}.areas")
    if not areas or min(areas) < 0:
        raise InputError("must be one or more non-negative numbers", key=f"{KEY}.areas")
    if not boxes:
        return KeyframeTruth(tuple(range(len(areas))), areas, ())
    ids = entry["frames"]
    if not all(type(i) is int for i in ids) or len(set(ids)) != len(ids):
        raise InputError("must be distinct integers", key=f"{KEY}.frames")
    return KeyframeTruth(
        tuple(ids),
        areas,
        tuple(_boxes(b, f"{KEY}.boxes[{k}]") for k, b in enumerate(entry["boxes"])),
    )


def _boxes(value: Any, key: str) -> tuple[Box, ...]:
    if not isinstance(value, list):
        raise InputError("must be a list of boxes", key=key)
    return tuple(_box(box, f"{key}[{number}]") for number, box in enumerate(value))


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
