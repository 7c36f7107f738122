"""Agentic keyframe selection as an episode: judge, and on B select again (eqs. 2 to 4).

The rules without verl, vLLM or torch; `agentic_loop` plays episodes in the rollout. They are the
pipeline's own (`rcot_rl.inference.pipeline`): at most λ judgements; a re-selection that names no
frame, or a refused one, falls to the frame farthest from all refused; the last candidate stands.

What an episode is worth is decided by where it ended: the last verdict (right when A is said of a
frame that shows a target, B of one that shows none) and the chosen frame's area over the greatest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from rcot_rl.errors import InputError
from rcot_rl.protocol.keyframes import farthest
from rcot_rl.protocol.parser import parse_keyframe, parse_option, parse_response

KEY = "extra_info.clip"


class Clip(msgspec.Struct):
    """Of `extra_info.clip`: the frames to choose from."""

    frames: list[str]
    """Paths of images."""
    keyframe: int
    """The position of the row's own frame, which is judged first."""
    areas: list[int]
    """Pixels of the targets' union in each frame."""


def read_clip(extra_info: Any) -> Clip:
    """The row's clip. Raises InputError when there is none, or it is none."""
    value = extra_info.get("clip") if isinstance(extra_info, dict) else None
    if not value:
        raise InputError(
            "missing; the agentic loop needs shards with data.clip_frames and clip_tasks: [aks]",
            key=KEY,
        )
    try:
        clip = msgspec.json.decode(value, type=Clip)
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise InputError(f"is no clip: {error}", key=KEY) from error
    if len(clip.areas) != len(clip.frames) or not 0 <= clip.keyframe < len(clip.frames):
        raise InputError("needs frames, an area for each, and a keyframe in them", key=KEY)
    return clip


@dataclass
class Episode:
    """One response to a prompt, as it is played."""

    clip: Clip
    rounds: int
    """λ."""
    candidate: int = field(init=False)
    """The position of the frame that stands."""
    judged: int | None = None
    """The position of the frame that the last verdict was about."""
    judgements: int = 0
    refused: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.candidate = self.clip.keyframe

    def verdict(self, response: str) -> bool:
        """Take a judgement of the candidate; whether it has to be selected again."""
        self.judged = self.candidate
        self.judgements += 1
        if parse_option(parse_response(response).answer) != "B":
            return False
        self.refused.append(self.candidate)
        return len(set(self.refused)) < len(self.clip.frames)

    def selection(self, response: str) -> bool:
        """Take a re-selection; whether the new candidate is to be judged."""
        n = len(self.clip.frames)
        chosen = parse_keyframe(parse_response(response).answer, n)
        if chosen is None or chosen in self.refused:
            chosen = farthest(n, self.refused)
        self.candidate = chosen
        return self.judgements < self.rounds

    def outcome(self) -> dict[str, Any]:
        """For the reward: `truth` of the last verdict, the chosen frame's `area` as a share of the
        greatest (1 where no frame shows a target), the number of `judgements`, the positions."""
        if self.judged is None:
            raise ValueError("nothing was judged yet")
        areas, greatest = self.clip.areas, max(self.clip.areas)
        return {
            "truth": "A" if areas[self.judged] else "B",
            "area": areas[self.candidate] / greatest if greatest else 1.0,
            "judgements": self.judgements,
            "judged": self.judged,
            "chosen": self.candidate,
        }
