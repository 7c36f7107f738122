"""verl's FSDP engine on NVIDIA GPUs with torch's own attention (`models.attention: sdpa`).

Loaded by `actor_rollout_ref.model.external_lib`, so only in training workers. Registered for the
vendor, which verl's registry looks up before the device.
"""

from __future__ import annotations

from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from rcot_rl.training.sdpa_engine_mixin import SdpaEngineMixin


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=["cuda"], vendor=["nvidia"]
)
class SdpaFSDPEngineWithLMHead(SdpaEngineMixin, FSDPEngineWithLMHead):
    """verl's engine with batched kernels."""
