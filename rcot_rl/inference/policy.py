"""What is asked of a policy at inference: one user turn about one image or video, and how to draw.

The pipeline and the held-out rewards know no more of a model than this; `engine.py` has the one
that runs in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Request:
    """One user turn about one image or one video."""

    text: str
    """Without media placeholder; special tokens in it are defused."""

    image: np.ndarray | None = None
    """uint8 [S, S, 3] RGB."""

    video: np.ndarray | None = None
    """uint8 [T, S, S, 3] RGB, every frame of it shown."""

    fps: float = 2.0
    """Frames a second of `video`."""

    seed: int | None = None
    """Makes samples repeatable, whatever else is in the batch."""

    def __post_init__(self) -> None:
        if (self.image is None) == (self.video is None):
            raise ValueError("a request has either an image or a video")


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy."""

    max_tokens: int
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1


class Policy(Protocol):
    """What the pipeline needs of a model."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[str]]:
        """`sampling.n` responses for each request, in order."""
        ...
