"""How prompts and answers name the frames of a clip: by position, or by time in seconds.

Qwen2.5-VL merges two neighbouring frames into the same tokens, so that it sees the time of a pair
better than the number of a frame. It was trained with absolute times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rcot_rl.protocol.parser import parse_keyframe

_SECONDS = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,6})?")


@dataclass(frozen=True)
class FrameNames:
    """Names of the shown frames."""

    times: tuple[float, ...] | None = None
    """Seconds of each shown frame, ascending; None: a frame's name is its 0-based position."""

    def name(self, position: int) -> str:
        """Return the name of the shown frame at `position`."""
        return str(position) if self.times is None else f"{self.times[position]:.2f}"

    def parse(self, answer: str | None, n_frames: int) -> int | None:
        """Return the position that an answer to KFG names (eq. 1); None without a valid one.

        A time names the nearest of the `n_frames` shown frames, on a tie the earlier. It must not
        exceed the last frame's time by more than half of the mean distance between frames.
        """
        times = self.times
        if times is None:
            return parse_keyframe(answer, n_frames)
        text = (answer or "").strip()
        if not _SECONDS.fullmatch(text):
            return None
        seconds, last = float(text), times[-1]
        if seconds > last + 0.5 * last / max(1, n_frames - 1):
            return None
        return min(range(n_frames), key=lambda i: abs(times[i] - seconds))
