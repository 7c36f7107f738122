"""What `rcot segment` reports: one line per step, and what was found or why nothing was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rcot_rl.inference.query_trace import Trace, TraceStep
from rcot_rl.protocol.grounding import parse_grounding
from rcot_rl.protocol.parser import parse_option, parse_response

NothingFound = Literal["unreadable_answer", "no_object", "no_valid_box", "empty_masks"]

_UNREADABLE = (
    "answer_missing",
    "answer_too_long",
    "answer_not_a_list",
    "item_not_an_object",
    "json_too_deep",
    "json_invalid",
)
"""Faults of `parse_grounding` about the whole answer."""

SHOWN_CHARACTERS = 100
"""Longest part of a model's text that a line shows."""


@dataclass(frozen=True)
class SegmentOutcome:
    """The result of one query."""

    trace: Trace
    out: Path
    """Folder of the results."""
    frame_names: tuple[str, ...]
    shares: Sequence[float]
    """Masked share of each frame's area."""
    as_video: bool = True
    """The overlay is an mp4, not a folder of frames."""

    @property
    def overlay(self) -> Path:
        """The overlay's file or folder."""
        return self.out / ("overlay.mp4" if self.as_video else "overlay")

    @property
    def frames_with_mask(self) -> int:
        """Number of frames with at least one masked pixel."""
        return sum(share > 0 for share in self.shares)

    @property
    def area_share(self) -> float:
        """Mean masked share of the area of the frames with a mask; 0.0 without any."""
        return sum(self.shares) / max(1, self.frames_with_mask)

    @property
    def nothing_found(self) -> NothingFound | None:
        """Why no frame has a mask; None if one has."""
        if self.frames_with_mask:
            return None
        if self.trace.boxes_source:
            return "empty_masks"
        faults = self._grounding_faults()
        if not faults:
            return "no_object"
        return "unreadable_answer" if set(faults) & set(_UNREADABLE) else "no_valid_box"

    def sentence(self) -> str:
        """Return what was found, or why nothing was found, in one line."""
        trace = self.trace
        reason = self.nothing_found
        judged = f"keyframe {trace.keyframe} of {len(self.shares)} frames, {_selection(trace)}"
        if reason is None:
            found = (
                f"{_counted(len(trace.boxes_source), 'object')}, {judged}; mask in "
                f"{self.frames_with_mask} of {_counted(len(self.shares), 'frame')}, "
                f"{100 * self.area_share:.1f} % of their area"
            )
        else:
            found = f"nothing found: {self._explained(reason)} ({judged})"
        return f"{_shown(trace.query)}: {found}"

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        return {
            "query": self.trace.query,
            "objects": len(self.trace.boxes_source),
            "keyframe": self.trace.keyframe,
            "keyframe_name": self.frame_names[self.trace.keyframe],
            "rounds": self.trace.rounds,
            "refused": refused_frames(self.trace),
            "n_frames": len(self.shares),
            "frames_with_mask": self.frames_with_mask,
            "area_share": self.area_share,
            "nothing_found": self.nothing_found,
        }

    def _explained(self, reason: NothingFound) -> str:
        if reason == "empty_masks":
            boxes = _counted(len(self.trace.boxes_source), "box", "boxes")
            return f"the model gave {boxes}, but the segmenter masked no pixel"
        if reason == "no_object":
            return "the model's answer lists no object"
        faults = ", ".join(dict.fromkeys(self._grounding_faults()))
        if reason == "unreadable_answer":
            return f"the model's answer is unreadable ({faults})"
        return f"the model's answer has no valid box ({faults})"

    def _grounding_faults(self) -> list[str]:
        return [f.removeprefix("ktg:") for f in self.trace.faults if f.startswith("ktg:")]


def refused_frames(trace: Trace) -> list[int]:
    """Return the frames that the model refused, in order."""
    return [
        step.frame
        for step in trace.steps
        if step.task == "aks" and step.frame is not None and _verdict(step.response) == "B"
    ]


def step_text(step: TraceStep) -> str:
    """Return one line about a step."""
    answer = parse_response(step.response).answer
    if step.task == "vdg":
        return f"description: {_shown(answer or step.response) or 'empty'}"
    if step.task == "aks":
        verdicts = {"A": "accepted", "B": "refused", None: "no valid answer"}
        return f"judged frame {step.frame}: {verdicts[_verdict(step.response)]}"
    if step.task == "ktg":
        boxes = sum(item.box is not None for item in parse_grounding(answer).items)
        return f"grounded frame {step.frame}: {_counted(boxes, 'object')}"
    return f"keyframe proposal: {_shown(answer or 'no answer')}"


def _verdict(response: str) -> str | None:
    return parse_option(parse_response(response).answer)


def _selection(trace: Trace) -> str:
    refused = refused_frames(trace)
    text = _counted(trace.rounds, "judgement")
    if "aks:all_frames_refused" in trace.faults:
        return f"{text}, all frames refused"
    return f"{text}, refused: {', '.join(map(str, refused))}" if refused else text


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def _shown(text: str) -> str:
    """Return a text from a user or a model for a terminal: one line, no control characters."""
    line = "".join(c if c.isprintable() else " " for c in text).strip()
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…"
