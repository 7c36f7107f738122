"""KTG (keyframe target grounding) answers: the grounded objects as typed values (paper, eq. 5).

JSON is strictly RFC 8259: no NaN, no Infinity, no code fence, no single quotes. If an object has a
key twice, the last value counts, as in every common JSON reader. Numbers are read as float64; one
that does not fit, or has more than `MAX_DIGITS` characters, is not finite. msgspec is tried first;
text that it refuses is read again by the standard library, which reports where and why.

Linear in the length of the text; no text raises. Not implemented: repair of any kind.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import msgspec

from rcot_rl.protocol.parser import MAX_CHARS, ParseFault

_INF = math.inf

MAX_DEPTH = 64
"""Deepest nesting of JSON lists and objects."""
MAX_ITEMS = 1 << 16
"""Maximum number of entries read; further ones are counted as faulty."""
MAX_DIGITS = 400
"""Longest JSON number, in characters; float64 ends near 310."""

Box = tuple[float, float, float, float]
Point = tuple[float, float]


class GroundedObject(msgspec.Struct, frozen=True):
    """One object of a grounding answer."""

    box: Box | None
    """(x1, y1, x2, y2) in the answer's coordinate frame: finite, x1 < x2, y1 < y2. Else None."""
    point: Point | None
    """(x, y), finite; else None."""
    faults: tuple[ParseFault, ...]
    """Reason codes; empty if and only if box and point are both valid."""


class GroundingAnswer(msgspec.Struct, frozen=True):
    """The objects of a KTG answer (eq. 5)."""

    is_list: bool
    """True if the answer is a JSON list and every entry is an object."""
    items: list[GroundedObject]
    """One per entry, in order; empty if `is_list` is False."""
    faults: tuple[ParseFault, ...]
    """Why the answer is not a list of objects; empty if it is."""
    n_items: int
    """Number of entries, valid or not; 0 if `is_list` is False."""
    has_faulty: bool = False
    """True if any item has a fault."""


def parse_grounding(answer: str | None) -> GroundingAnswer:
    """Parse a KTG answer, `[{"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}, …]`. Never raises.

    Args:
        answer: Content of the answer block; None: the response has no answer.

    Returns:
        The objects, with coordinates as given, in pixels of the canvas that the prompt showed.
    """
    if answer is None:
        return _no_grounding("answer_missing")
    if len(answer) > MAX_CHARS:
        return _no_grounding("answer_too_long", MAX_CHARS)
    items = _faultless(answer)
    if items is not None:
        return GroundingAnswer(True, items, (), len(items))
    value = read_json(answer)
    if isinstance(value, ParseFault):
        return GroundingAnswer(False, [], (value,), 0)
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
    return GroundingAnswer(True, items, (), len(items), any(item.faults for item in items))


def _number(token: str) -> float:
    return float(token) if len(token) <= MAX_DIGITS else math.inf


def _not_json(token: str) -> None:
    raise ValueError(f"{token} is not JSON")


class _Entry(msgspec.Struct, gc=False):
    bbox_2d: tuple[float, float, float, float]
    point_2d: tuple[float, float]


_ENTRIES = msgspec.json.Decoder(list[_Entry])
_FAST = msgspec.json.Decoder()
_SLOW = json.JSONDecoder(parse_float=_number, parse_int=_number, parse_constant=_not_json)
_LONG_NUMBER = re.compile(rf"[-+.0-9eE]{{{MAX_DIGITS + 1}}}")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def _faultless(text: str) -> list[GroundedObject] | None:
    """Return the items of an answer without any fault, as nearly all are; else None."""
    if len(text) > MAX_DIGITS and _LONG_NUMBER.search(text):
        return None
    try:
        entries = _ENTRIES.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    # three brackets per object and one around them: nothing else is nested
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
        items.append(GroundedObject(entry.bbox_2d, entry.point_2d, ()))
    return items


def read_json(text: str) -> Any:
    """Return the value of a JSON text, or a ParseFault. Numbers beyond float64 become infinite."""
    if len(text) <= MAX_DIGITS or not _LONG_NUMBER.search(text):
        try:
            return _FAST.decode(text)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            pass  # not JSON, half a surrogate pair, or a number beyond float64
    position = _too_deep_at(text)
    if position >= 0:
        return ParseFault("json_too_deep", position)
    try:
        return _SLOW.decode(text)
    except json.JSONDecodeError as error:
        return ParseFault("json_invalid", error.pos)
    except ValueError:
        return ParseFault("json_invalid", 0)


def _too_deep_at(text: str) -> int:
    """Return where nesting outside strings first exceeds MAX_DEPTH; -1: nowhere."""
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
    """Return True if a decoded value nests deeper than `left` lists and objects."""
    if type(value) is list:
        children: Any = value
    elif type(value) is dict:
        children = value.values()
    else:
        return False
    return left == 0 or any(_is_deep(child, left - 1) for child in children)


def _no_grounding(fault: str, at: int = 0) -> GroundingAnswer:
    return GroundingAnswer(False, [], (ParseFault(fault, at),), 0)


def _item(entry: dict[str, Any], number: int) -> GroundedObject | None:
    """Return one entry; None if it nests too deep."""
    box, point = entry.get("bbox_2d"), entry.get("point_2d")
    good_box, good_point = read_box(box), _point(point)
    if good_box is not None and good_point is not None and len(entry) == 2:
        return GroundedObject(good_box, good_point, ())
    if _is_deep(entry, MAX_DEPTH - 1):
        return None
    faults = []
    if good_box is None:
        faults.append(ParseFault(_box_fault(entry), number))
    if good_point is None:
        faults.append(ParseFault(_point_fault(entry), number))
    return GroundedObject(good_box, good_point, tuple(faults))


def _unread(number: int) -> GroundedObject:
    return GroundedObject(None, None, (ParseFault("items_too_many", number),))


_REAL = (float, int)  # exact types, so that a JSON true is not a number


def read_box(value: Any) -> Box | None:
    """Return a decoded list of four ordered, finite numbers as a box; None for anything else."""
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
