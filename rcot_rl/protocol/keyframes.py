"""Rules on keyframes and clips that inference and the agentic rollout share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def farthest(n_frames: int, refused: Sequence[int]) -> int:
    """The frame farthest from all refused ones, the earliest of equals; at least one is refused."""
    return max(range(n_frames), key=lambda t: (min(abs(t - r) for r in refused), -t))


def video_metadata(n_frames: int, fps: float) -> dict[str, Any]:
    """What processors are told of a clip whose frames are all shown, `fps` of them a second."""
    return {"fps": fps, "total_num_frames": n_frames}
