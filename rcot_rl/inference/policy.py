"""The interface of a policy at inference: one user turn about one image or video, and sampling.

The pipeline and the held-out rewards depend only on this; `engine.py` implements it with vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rcot_rl.recipe.inference_section import PolicyTask, ReasoningSection


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
    media_key: str | None = None
    """Equal for equal media, so that the engine need not compare pixels."""
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
    options: tuple[str, ...] = ()
    """Answers of one token whose probabilities are wanted, such as A and B."""


@dataclass(frozen=True)
class PolicyResponse:
    """One response and what it cost."""

    text: str
    """Without special tokens."""
    tokens: int = 0
    """Number of generated tokens."""
    prompt_tokens: int = 0
    """Number of tokens of the prompt, with its image or video."""
    cached_tokens: int = 0
    """Number of prompt tokens taken from the prefix cache."""
    seconds: float = 0.0
    """From the first scheduling to the last token, without the time in the queue."""
    option_probabilities: dict[str, float] | None = None
    """Probability of each of `Sampling.options` at the answer's first token; None if none was asked
    for, or the response has no answer."""


class Policy(Protocol):
    """A model that answers requests. Many requests can be in progress at the same time."""

    async def generate(
        self, request: PolicyRequest, sampling: Sampling, started: asyncio.Event | None = None
    ) -> list[PolicyResponse]:
        """Return `sampling.n` responses.

        Args:
            started: Set as soon as the prompt has been processed; its media are then in the caches.
        """
        ...

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        ...

    def most_frames(self, side: int, text_tokens: int) -> int:
        """Return the number of video frames that fit beside a text and a response.

        Args:
            side: Side of the square frames in pixels.
            text_tokens: Tokens of the text and of the response.
        """
        ...


@dataclass(frozen=True)
class PolicySet:
    """The policies of a pipeline: the scored checkpoint, and other models for some tasks."""

    checkpoint: Policy
    others: Mapping[str, Policy] = field(default_factory=dict)
    """By model, as `predict.models` names it."""

    def of(self, task: PolicyTask, settings: ReasoningSection) -> Policy:
        """Return the policy of a task."""
        model = settings.models.get(task)
        return self.checkpoint if model is None else self.others[model]


async def gather_texts(
    policy: Policy, requests: Sequence[PolicyRequest], sampling: Sampling
) -> list[list[str]]:
    """Return the texts of the responses to many requests, which are in progress together."""
    answers = await asyncio.gather(*(policy.generate(r, sampling) for r in requests))
    return [[response.text for response in responses] for responses in answers]
