"""Answers: what the policy said, as typed values. One parser for rewards, traces and inference.

Implements the structure that section 3.2 and equations 4 and 5 of the paper ask of a response:
reasoning inside `<think></think>`, then the decision inside `<answer></answer>`.

Blocks. Tags do not nest: reading from the left, a block runs from an opening tag to the next
closing tag of its kind, and what lies inside it opens nothing. An opening tag that is never closed
starts no block.

JSON is RFC 8259 and nothing more: no NaN, no Infinity, no code fence, no single quotes. Where an
object names a key twice the last value counts, as in every common JSON reader. Numbers are read as
float64; one that does not fit, or has more than `MAX_DIGITS` characters, is not finite.

Everything here is linear in the length of the text, and no text raises. The bounds (`MAX_*`) are
far from any honest answer; text beyond one counts as malformed, never as shorter than it is.

Left out: positions of faults, and repair of any kind (what is not accepted in training must not be
accepted at inference).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

MAX_CHARS = 1 << 22
"""Longest response that is read, in characters."""
MAX_BLOCKS = 4096
"""Most `<think>` and `<answer>` blocks that are told apart in one response."""
MAX_DEPTH = 64
"""Deepest nesting of JSON lists and objects."""
MAX_DIGITS = 400
"""Longest JSON number, in characters; float64 ends near 310."""

THINK, THINK_END = "<think>", "</think>"
ANSWER, ANSWER_END = "<answer>", "</answer>"
TAGS = (THINK, THINK_END, ANSWER, ANSWER_END)

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class ParsedResponse:
    """The structure of one response."""

    thought: str | None
    """Stripped content of the only think block; None without exactly one."""
    answer: str | None
    """Stripped content of the only answer block outside any think block, well formed or not; None
    without exactly one."""
    well_formed: bool
    """Exactly `<think>…</think><answer>…</answer>`, white space around and between aside."""
    faults: tuple[str, ...]
    """Reason codes; empty exactly when well formed."""


class Item(NamedTuple):
    """One object of a grounding answer."""

    box: Box | None
    """(x1, y1, x2, y2), finite, x1 < x2 and y1 < y2, in the answer's own frame; else None."""
    point: Point | None
    """(x, y), finite; else None."""
    faults: tuple[str, ...]
    """Reason codes; empty exactly when box and point are both there."""


@dataclass(frozen=True)
class Grounding:
    """The objects of a KTG answer (eq. 5)."""

    is_list: bool
    """The answer is a JSON list whose every entry is an object."""
    items: list[Item]
    """One per entry, in order; empty when `is_list` is False."""
    faults: tuple[str, ...]
    """Why it is not a list of objects; empty when it is."""
    n_items: int
    """How many entries the list has, valid or not; 0 when `is_list` is False."""


def parse_response(text: str) -> ParsedResponse:
    """Split a response into thought and answer. Never raises on any str."""
    if len(text) > MAX_CHARS:
        return ParsedResponse(None, None, False, ("response_too_long",))
    body = text.strip()
    blocks = _blocks(body)
    if blocks is None:
        return ParsedResponse(None, None, False, ("too_many_blocks",))
    thoughts, answers = blocks
    well_formed = _well_formed(body)
    return ParsedResponse(
        thought=thoughts[0].strip() if len(thoughts) == 1 else None,
        answer=answers[0].strip() if len(answers) == 1 else None,
        well_formed=well_formed,
        faults=() if well_formed else _structure_faults(body, thoughts, answers),
    )


def parse_option(answer: str | None, options: Sequence[str] = ("A", "B")) -> str | None:
    """The option that an AKS answer names (eq. 4): exactly one of `options`, or None.

    Exact membership after stripping: no prefix, no other case, no substring, no full stop.
    """
    if answer is None:
        return None
    answer = answer.strip()
    return answer if answer in tuple(options) else None


def parse_keyframe(answer: str | None, n_frames: int) -> int | None:
    """The 0-based frame index of a KFG answer (eq. 1), or None.

    Bare ASCII digits, 0 <= index < n_frames; anything else is no answer. What to do without one is
    the caller's decision, in the open.
    """
    if answer is None:
        return None
    answer = answer.strip()
    if not (0 < len(answer) <= 9 and answer.isascii() and answer.isdigit()):
        return None
    index = int(answer)
    return index if index < n_frames else None


def parse_grounding(answer: str | None) -> Grounding:
    """The objects of a KTG answer, `[{"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]}, …]`.

    answer: the content of the answer block, or None for no answer. Coordinates are returned as
    they stand, in pixels of the canvas that the prompt showed. Never raises.
    """
    if answer is None:
        return _no_grounding("answer_missing")
    if len(answer) > MAX_CHARS:
        return _no_grounding("answer_too_long")
    if _deeper_than(answer, MAX_DEPTH):
        return _no_grounding("json_too_deep")
    try:
        value = _JSON.decode(answer)
    except ValueError:
        return _no_grounding("json_invalid")
    if not isinstance(value, list):
        return _no_grounding("answer_not_a_list")
    if not all(isinstance(entry, dict) for entry in value):
        return _no_grounding("item_not_an_object")
    return Grounding(True, [_item(entry) for entry in value], (), len(value))


def _blocks(body: str) -> tuple[list[str], list[str]] | None:
    """Contents of the think blocks and of the answer blocks; None beyond MAX_BLOCKS.

    Linear: the place of the next opening tag of each kind is kept until it is passed, so no stretch
    of text is searched twice for the same tag.
    """
    thoughts: list[str] = []
    answers: list[str] = []
    think, answer = body.find(THINK), body.find(ANSWER)
    while think >= 0 or answer >= 0:
        is_think = answer < 0 or 0 <= think < answer
        if is_think:
            start, closing, found = think + len(THINK), THINK_END, thoughts
        else:
            start, closing, found = answer + len(ANSWER), ANSWER_END, answers
        end = body.find(closing, start)
        if end < 0:  # nor can any later block of this kind be closed
            think, answer = (-1, answer) if is_think else (think, -1)
            continue
        if len(thoughts) + len(answers) == MAX_BLOCKS:
            return None
        found.append(body[start:end])
        end += len(closing)
        if 0 <= think < end:
            think = body.find(THINK, end)
        if 0 <= answer < end:
            answer = body.find(ANSWER, end)
    return thoughts, answers


def _well_formed(body: str) -> bool:
    if not (body.startswith(THINK) and body.endswith(ANSWER_END)):
        return False
    if any(body.count(tag) != 1 for tag in TAGS):
        return False
    between = body.find(THINK_END) + len(THINK_END)
    start = body.find(ANSWER)
    return start >= between and not body[between:start].strip()


def _structure_faults(body: str, thoughts: list[str], answers: list[str]) -> tuple[str, ...]:
    """Why a response is not well formed: at least one code."""
    faults = []
    if not thoughts:
        if any(THINK in content for content in answers):
            faults.append("think_inside_answer")
        else:
            faults.append("think_unclosed" if THINK in body else "think_missing")
    elif len(thoughts) > 1:
        faults.append("think_repeated")
    if not answers:
        if any(ANSWER in content for content in thoughts):
            faults.append("answer_inside_think")
        else:
            faults.append("answer_unclosed" if ANSWER in body else "answer_missing")
    elif len(answers) > 1:
        faults.append("answer_repeated")
    if faults:
        return tuple(faults)
    if any(body.count(tag) > 1 for tag in TAGS):
        return ("stray_tag",)
    if body.find(ANSWER) < body.find(THINK):
        return ("answer_before_think",)
    return ("text_outside_tags",)


def _number(token: str) -> float:
    return float(token) if len(token) <= MAX_DIGITS else math.inf


def _not_json(token: str) -> None:
    raise ValueError(f"{token} is not JSON")


_JSON = json.JSONDecoder(parse_float=_number, parse_int=_number, parse_constant=_not_json)
_BRACKET = re.compile(r"[\[\]{}]")


def _deeper_than(text: str, bound: int) -> bool:
    """Whether lists and objects nest deeper than `bound`, strings aside, without recursion."""
    if text.count("[") + text.count("{") <= bound:
        return False
    depth = 0
    outside_strings = text.replace("\\\\", "").replace('\\"', "").split('"')[::2]
    for piece in outside_strings:
        for match in _BRACKET.finditer(piece):
            depth += 1 if match[0] in "[{" else -1
            if depth > bound:
                return True
    return False


def _no_grounding(fault: str) -> Grounding:
    return Grounding(False, [], (fault,), 0)


def _item(entry: dict[str, Any]) -> Item:
    box, box_fault = _box(entry)
    point, point_fault = _point(entry)
    faults = tuple(fault for fault in (box_fault, point_fault) if fault)
    return Item(box, point, faults)


def _floats(value: Any, n: int) -> bool:
    # the decoder reads every JSON number as a float, so true, null and "1" are of other types
    return isinstance(value, list) and len(value) == n and all(type(v) is float for v in value)


def _box(entry: dict[str, Any]) -> tuple[Box | None, str | None]:
    if "bbox_2d" not in entry:
        return None, "box_missing"
    value = entry["bbox_2d"]
    if not _floats(value, 4):
        return None, "box_not_four_numbers"
    if not all(map(math.isfinite, value)):
        return None, "box_not_finite"
    x1, y1, x2, y2 = value
    if not (x1 < x2 and y1 < y2):
        return None, "box_not_ordered"
    return (x1, y1, x2, y2), None


def _point(entry: dict[str, Any]) -> tuple[Point | None, str | None]:
    if "point_2d" not in entry:
        return None, "point_missing"
    value = entry["point_2d"]
    if not _floats(value, 2):
        return None, "point_not_two_numbers"
    if not all(map(math.isfinite, value)):
        return None, "point_not_finite"
    return (value[0], value[1]), None
