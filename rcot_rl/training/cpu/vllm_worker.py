"""vLLM worker extension for CPU rollouts: keeps linear weights reloadable.

vLLM's CPU backend packs each linear weight into a oneDNN handle and frees the parameter
(`dispatch_cpu_unquantized_gemm(remove_weight=True)`), which leaves verl's weight sync nowhere to
write: the first sync fails inside the engine, and the trainer waits without end. Without oneDNN the
layer falls back to `F.linear` and keeps its weight.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from rcot_rl.training.verl_patches import separate_weight_sockets

separate_weight_sockets()


class CpuWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension with oneDNN packing switched off before the model is built."""

    def __new__(cls, **kwargs: Any) -> CpuWorkerExtension:
        from vllm import _custom_ops

        if not hasattr(_custom_ops, "_supports_onednn"):
            raise RuntimeError("vllm._custom_ops has no _supports_onednn: weight sync would fail")
        _custom_ops._supports_onednn = False
        threads = kwargs["vllm_config"].additional_config.get("rcot_threads")
        if threads is not None:  # vLLM's worker disables this call when it is initialized
            torch.set_num_threads(int(threads))
        return super().__new__(cls, **kwargs)
