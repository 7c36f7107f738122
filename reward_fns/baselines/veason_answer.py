"""Veason-R1's answers: `{"keyframe_timestamp": 12, "bbox_2d_list": [[x1, y1, x2, y2], …]}`.

Read by the same JSON reader and with the same limits as KTG answers.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rcot_rl.protocol.grounding import MAX_ITEMS, Box, read_box, read_json
from rcot_rl.protocol.parser import MAX_CHARS, ParseFault
from reward_fns.registry import Response


class VeasonAnswer(msgspec.Struct, frozen=True):
    """One parsed answer."""

    keyframe: int | None
    """Id of the chosen frame, if it is an integer."""
    boxes: list[Box | None]
    """One per list entry, None if it is not a valid box; empty without a list."""
    faults: tuple[str, ...]
    """Reason codes; empty if keyframe and boxes are valid."""


def veason_answer(response: Response) -> VeasonAnswer:
    """Parse the answer of a response. Never raises."""
    answer = response.parsed.answer
    if answer is None:
        return VeasonAnswer(None, [], ("answer_missing",))
    if len(answer) > MAX_CHARS:
        return VeasonAnswer(None, [], ("answer_too_long",))
    value: Any = read_json(answer)
    if isinstance(value, ParseFault):
        return VeasonAnswer(None, [], (value,))
    if not isinstance(value, dict):
        return VeasonAnswer(None, [], ("answer_not_an_object",))
    faults = []
    keyframe = value.get("keyframe_timestamp")
    if type(keyframe) is float and keyframe.is_integer() and abs(keyframe) < 2**53:
        keyframe = int(keyframe)
    if type(keyframe) is not int:
        keyframe = None
        faults.append("keyframe_not_a_number")
    entries = value.get("bbox_2d_list")
    if not isinstance(entries, list):
        return VeasonAnswer(keyframe, [], (*faults, "boxes_not_a_list"))
    boxes = [read_box(entry) if k < MAX_ITEMS else None for k, entry in enumerate(entries)]
    if None in boxes:
        faults.append("box_invalid")
    return VeasonAnswer(keyframe, boxes, tuple(faults))
