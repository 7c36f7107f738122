"""verl's FSDP engine for device `cpu`; loaded by `actor_rollout_ref.model.external_lib`."""

from __future__ import annotations

from typing import Any

import torch
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

from rcot_rl.training.verl_patches import weight_sockets

weight_sockets()  # here and in `vllm_worker`: where both ends of the sync are made


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu"])
class CpuFSDPEngineWithLMHead(transformer_impl.FSDPEngineWithLMHead):
    """The same engine; the reference is not pinned, log-probabilities come all at once."""

    def _build_fsdp_module(self, module: Any) -> Any:
        # transformer_impl.py wraps a forward-only model in CPUOffloadPolicy(pin_memory=True);
        # pinning needs an accelerator, and here the parameters are on the host already.
        offload_policy = transformer_impl.CPUOffloadPolicy
        transformer_impl.CPUOffloadPolicy = lambda pin_memory=True: offload_policy(pin_memory=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            transformer_impl.CPUOffloadPolicy = offload_policy

    def prepare_model_outputs(self, *args: Any, **kwargs: Any) -> Any:
        # Without flash attention verl takes logsumexp token by token, to save an accelerator's
        # memory: with autograd, that takes longer than a small model itself.
        original = transformer_impl.logprobs_from_logits
        transformer_impl.logprobs_from_logits = log_probs_of_labels
        try:
            return super().prepare_model_outputs(*args, **kwargs)
        finally:
            transformer_impl.logprobs_from_logits = original


def log_probs_of_labels(
    logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True
) -> torch.Tensor:
    """log softmax(logits)[labels], fp32.

    logits: [..., V]; labels: [...]. As verl's `logprobs_from_logits`, in one call for all tokens;
    inplace_backward is an option of its CUDA kernel and has no meaning here.
    """
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)
