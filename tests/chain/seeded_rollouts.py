"""An agent loop whose samples depend on neither scheduling nor the number of rollout replicas.

vLLM draws from one generator an engine, in the order in which requests happen to be batched, and
verl sends a request to whichever replica has the fewest: no two runs sample alike. Here each
response has a seed of its own, made of its row, its number in the group and the step. Runs on
different hosts then draw the same tokens from the same weights, and their losses can be compared.

Named by `agent_loop_manager_class` and `default_agent_loop`; its folder must be on PYTHONPATH. Not
part of the product: seeded requests are sampled one by one, which is slow on a GPU.
"""

from __future__ import annotations

import zlib
from typing import Any

import ray
from verl.experimental.agent_loop.agent_loop import register

from rcot_rl.training.cached_agent_loop import (
    CachedAgentLoopManager,
    CachedAgentLoopWorkerTQ,
    CachedSingleTurn,
)


@register("seeded_single_turn")
class SeededSingleTurn(CachedSingleTurn):
    """The product's loop, with `seed` among its sampling parameters."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        """As verl's; the dictionary is shared by the responses of a group, so it is copied."""
        row = kwargs["extra_info"]["index"]
        name = f"{row}/{kwargs['session_id']}/{kwargs['global_steps']}"
        seeded = dict(sampling_params) | {"seed": zlib.crc32(name.encode())}
        return await super().run(seeded, **kwargs)


class SeededWorker(CachedAgentLoopWorkerTQ):
    """The product's worker, in a process where the loop above is registered."""


class SeededManager(CachedAgentLoopManager):
    """`agent_loop_manager_class: seeded_rollouts.SeededManager`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(SeededWorker)
