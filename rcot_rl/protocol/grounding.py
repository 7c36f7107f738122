"""KTG answers: the objects that the policy grounded, as typed values (eq. 5 of the paper).

JSON is RFC 8259 and nothing more: no NaN, no Infinity, no code fence, no single quotes. Where an
object names a key twice the last value counts, as in every common JSON reader. Numbers are read as
float64; one that does not fit, or has more than `MAX_DIGITS` characters, is not finite. msgspec
reads what it can; what it refuses is read again by the standard library, which says where and why.

Linear in the length of the text, and no text raises. Left out: repair of any kind.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import msgspec

from rcot_rl.protocol.parser import MAX_CHARS, Fault

_INF = math.inf

MAX_DEPTH = 64
"""Deepest nesting of JSON lists and objects."""
MAX_ITEMS = 1 << 16
"""Most entries that are read; those past it count, and are worth nothing."""
MAX_DIGITS = 400
"""Longest JSON number, in characters; float64 ends near 310."""

Box = tuple[float, float, float, float]
Point = tuple[float, float]


class Item(msgspec.Struct, frozen=True):
    """One object of a grounding answer."""

    box: Box | None
    """(x1, y1, x2, y2), finite, x1 < x2 and y1 < y2, in the answer's own frame; else None."""
    point: Point | None
    """(x, y), finite; else None."""
    faults: tuple[Fault, ...]
    """Reason codes; empty exactly when box and point are both there."""


class Grounding(msgspec.Struct, frozen=True):
    """The objects of a KTG answer (eq. 5)."""

    is_list: bool
    """The answer is a JSON list whose every entry is an object."""
    items: list[Item]
    """One per entry, in order; empty when `is_list` is False."""
    faults: tuple[Fault, ...]
    """Why it is not a list of objects; empty when it is."""
    n_items: int
    """How many entries the list has, valid or not; 0 when `is_list` is False."""
    has_faulty: bool = False
    """Whether any of the items has a fault."""


def parse_grounding(answer: str | None) -> Grounding:
    """The objects of a KTG answer, `[{"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}, …]`.

    answer: the content of the answer block, or None for no answer. Coordinates are returned as
    they stand, in pixels of the canvas that the prompt showed. Never raises.
    """
    if answer is None:
        return _no_grounding("answer_missing")
    if len(answer) > MAX_CHARS:
        return _no_grounding("answer_too_long", MAX_CHARS)
    items = _usual(answer)
    if items is not None:
        return Grounding(True, items, (), len(items))
    value = read_json(answer)
    if isinstance(value, Fault):
        return Grounding(False, [], (value,), 0)
    if type(value) is not list:
        deep = _is_deep(value, MAX_DEPTH)
        return _no_grounding("json_too_deep" if deep else "answer_not_a_list")
    items = []
    for number, entry in enumerate(value):
        if type(entry) is not dict:
            deep = _is_deep(value, MAX_DEPTH)
            return _no_grounding("json_too_deep" if deep else "item_not_an_object", number)
        item = _item(entry, number) if number < MAX_ITEMS else _unread(number)
        if item is None:
            return _no_grounding("json_too_deep", number)
        items.append(item)
    return Grounding(True, items, (), len(items), any(item.faults for item in items))


def _number(token: str) -> float:
    return float(token) if len(token) <= MAX_DIGITS else math.inf


def _not_json(token: str) -> None:
    raise ValueError(f"{token} is not JSON")


class _Entry(msgspec.Struct, gc=False):
    bbox_2d: tuple[float, float, float, float]
    point_2d: tuple[float, float]


_USUAL = msgspec.json.Decoder(list[_Entry])
_FAST = msgspec.json.Decoder()
_SLOW = json.JSONDecoder(parse_float=_number, parse_int=_number, parse_constant=_not_json)
_LONG_NUMBER = re.compile(rf"[-+.0-9eE]{{{MAX_DIGITS + 1}}}")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def _usual(text: str) -> list[Item] | None:
    """The items of an answer without any fault, which is what nearly every answer is; else None."""
    if len(text) > MAX_DIGITS and _LONG_NUMBER.search(text):
        return None
    try:
        entries = _USUAL.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    # three brackets an object and one around them: nothing else is in there that could nest
    if text.count("[") + text.count("{") != 3 * len(entries) + 1 or len(entries) > MAX_ITEMS:
        return None
    items = []
    for entry in entries:
        x1, y1, x2, y2 = entry.bbox_2d
        x, y = entry.point_2d
        if not (-_INF < x1 < x2 < _INF and -_INF < y1 < y2 < _INF):
            return None
        if not (-_INF < x < _INF and -_INF < y < _INF):
            return None
        items.append(Item(entry.bbox_2d, entry.point_2d, ()))
    return items


def read_json(text: str) -> Any:
    """A JSON text's value, or a Fault. Numbers that no float64 holds come back as infinite."""
    if len(text) <= MAX_DIGITS or not _LONG_NUMBER.search(text):
        try:
            return _FAST.decode(text)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            pass  # not JSON, half a surrogate pair, or a number beyond float64
    at = _too_deep_at(text)
    if at >= 0:
        return Fault("json_too_deep", at)
    try:
        return _SLOW.decode(text)
    except json.JSONDecodeError as error:
        return Fault("json_invalid", error.pos)
    except ValueError:
        return Fault("json_invalid", 0)


def _too_deep_at(text: str) -> int:
    """Where lists and objects nest deeper than MAX_DEPTH, strings aside; -1: nowhere."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return -1
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "[{":
            depth += 1
        elif token in "]}":
            depth -= 1
        if depth > MAX_DEPTH:
            return match.start()
    return -1


def _is_deep(value: Any, left: int) -> bool:
    """Whether a decoded value nests deeper than `left` lists and objects."""
    if type(value) is list:
        children: Any = value
    elif type(value) is dict:
        children = value.values()
    else:
        return False
    return left == 0 or any(_is_deep(child, left - 1) for child in children)


def _no_grounding(fault: str, at: int = 0) -> Grounding:
    return Grounding(False, [], (Fault(fault, at),), 0)


def _item(entry: dict[str, Any], number: int) -> Item | None:
    """One entry; None when it nests too deep."""
    box, point = entry.get("bbox_2d"), entry.get("point_2d")
    good_box, good_point = read_box(box), _point(point)
    if good_box is not None and good_point is not None and len(entry) == 2:
        return Item(good_box, good_point, ())
    if _is_deep(entry, MAX_DEPTH - 1):
        return None
    faults = []
    if good_box is None:
        faults.append(Fault(_box_fault(entry), number))
    if good_point is None:
        faults.append(Fault(_point_fault(entry), number))
    return Item(good_box, good_point, tuple(faults))


def _unread(number: int) -> Item:
    return Item(None, None, (Fault("items_too_many", number),))


_REAL = (float, int)  # the exact types: a JSON true is of neither


def read_box(value: Any) -> Box | None:
    """A decoded list of four ordered, finite numbers as a box; None for anything else."""
    if type(value) is not list or len(value) != 4:
        return None
    x1, y1, x2, y2 = value
    if not (type(x1) in _REAL and type(y1) in _REAL and type(x2) in _REAL and type(y2) in _REAL):
        return None
    try:
        box = (float(x1), float(y1), float(x2), float(y2))
    except OverflowError:
        return None
    if -_INF < box[0] < box[2] < _INF and -_INF < box[1] < box[3] < _INF:
        return box
    return None


def _point(value: Any) -> Point | None:
    if type(value) is not list or len(value) != 2:
        return None
    x, y = value
    if type(x) not in _REAL or type(y) not in _REAL:
        return None
    try:
        point = (float(x), float(y))
    except OverflowError:
        return None
    return point if -_INF < point[0] < _INF and -_INF < point[1] < _INF else None


def _box_fault(entry: dict[str, Any]) -> str:
    if "bbox_2d" not in entry:
        return "box_missing"
    value = entry["bbox_2d"]
    if not _numbers(value, 4):
        return "box_not_four_numbers"
    return "box_not_ordered" if all(map(_is_finite, value)) else "box_not_finite"


def _point_fault(entry: dict[str, Any]) -> str:
    if "point_2d" not in entry:
        return "point_missing"
    return "point_not_finite" if _numbers(entry["point_2d"], 2) else "point_not_two_numbers"


def _numbers(value: Any, n: int) -> bool:
    return isinstance(value, list) and len(value) == n and all(type(v) in _REAL for v in value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
