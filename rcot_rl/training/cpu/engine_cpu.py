"""verl's FSDP engine for device `cpu`; loaded by `actor_rollout_ref.model.external_lib`."""

from __future__ import annotations

from typing import Any

from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from rcot_rl.training.sdpa_engine_mixin import SdpaEngineMixin
from rcot_rl.training.verl_patches import separate_weight_sockets, unpinned_offload

separate_weight_sockets()  # here and in `vllm_worker`, where the two ends of the sync are built


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu"])
class CpuFSDPEngineWithLMHead(SdpaEngineMixin, FSDPEngineWithLMHead):
    """verl's engine with batched kernels and without pinned memory."""

    def _build_fsdp_module(self, module: Any) -> Any:
        with unpinned_offload():
            return super()._build_fsdp_module(module)
