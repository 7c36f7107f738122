"""Veason-R1's answers: `{"keyframe_timestamp": 12, "bbox_2d_list": [[x1, y1, x2, y2], …]}`.

Read by the same JSON reader and under the same bounds as the answers of KTG.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rcot_rl.protocol.grounding import MAX_ITEMS, Box, read_box, read_json
from rcot_rl.protocol.parser import MAX_CHARS, Fault
from reward_fns.registry import Response


class VeasonAnswer(msgspec.Struct, frozen=True):
    """One answer."""

    keyframe: int | None
    """The chosen frame's id, if it is a whole number."""
    boxes: list[Box | None]
    """One an entry of the list, None for what is no box; empty where there is no list."""
    faults: tuple[str, ...]
    """Reason codes; empty when keyframe and boxes are whole."""


def veason_answer(response: Response) -> VeasonAnswer:
    """The answer of a response. Never raises."""
    answer = response.parsed.answer
    if answer is None:
        return VeasonAnswer(None, [], ("answer_missing",))
    if len(answer) > MAX_CHARS:
        return VeasonAnswer(None, [], ("answer_too_long",))
    value: Any = read_json(answer)
    if isinstance(value, Fault):
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
