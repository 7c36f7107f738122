"""verl's FSDP engine for device `cpu`; loaded by `actor_rollout_ref.model.external_lib`."""

from __future__ import annotations

from typing import Any

from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

from rcot_rl.training.engine_sdpa import InFewCalls
from rcot_rl.training.verl_patches import weight_sockets

weight_sockets()  # here and in `vllm_worker`: where both ends of the sync are made


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu"])
class CpuFSDPEngineWithLMHead(InFewCalls, transformer_impl.FSDPEngineWithLMHead):
    """The same engine; the reference is not pinned."""

    def _build_fsdp_module(self, module: Any) -> Any:
        # transformer_impl.py wraps a forward-only model in CPUOffloadPolicy(pin_memory=True);
        # pinning needs an accelerator, and here the parameters are on the host already.
        offload_policy = transformer_impl.CPUOffloadPolicy
        transformer_impl.CPUOffloadPolicy = lambda pin_memory=True: offload_policy(pin_memory=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            transformer_impl.CPUOffloadPolicy = offload_policy
