"""The interface of a policy at inference: one user turn about one image or video, and sampling.

The pipeline and the held-out rewards depend only on this; `engine.py` implements it with vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class PolicyRequest:
    """One user turn about one image or one video."""

    text: str
    """Without the media placeholder; control tokens in it are neutralized."""
    image: np.ndarray | None = None
    """uint8 [S, S, 3] RGB."""
    video: np.ndarray | None = None
    """uint8 [T, S, S, 3] RGB; every frame is shown."""
    fps: float = 2.0
    """Frames per second of `video`."""
    seed: int | None = None
    """Makes samples repeatable, independent of the batch."""

    def __post_init__(self) -> None:
        if (self.image is None) == (self.video is None):
            raise ValueError("a request needs either an image or a video")


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled. Temperature 0 is greedy."""

    max_tokens: int
    n: int = 1
    """Responses per request."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1


class Policy(Protocol):
    """A model that answers requests."""

    def generate(self, requests: Sequence[PolicyRequest], sampling: Sampling) -> list[list[str]]:
        """Return `sampling.n` responses per request, in order."""
        ...
