"""verl's replay buffer, polled often: its own interval of 2 s is most of a small model's step."""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class FastPollReplayBuffer(ReplayBuffer):
    """`trainer.v1.sampler.custom_sampler`; verl hands a custom sampler no group filtering."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("poll_interval", 0.05)
        super().__init__(**kwargs)
