"""verl's FSDP engine on NVIDIA GPUs with torch's own attention (`models.attention: sdpa`).

Loaded by `actor_rollout_ref.model.external_lib`, so in training workers alone; registered for the
vendor, which verl's registry asks before the device.
"""

from __future__ import annotations

from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

from rcot_rl.training.engine_sdpa import InFewCalls


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=["cuda"], vendor=["nvidia"]
)
class SdpaFSDPEngineWithLMHead(InFewCalls, transformer_impl.FSDPEngineWithLMHead):
    """The same engine, without thousands of small kernels."""
