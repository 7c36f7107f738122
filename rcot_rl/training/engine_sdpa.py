"""verl's FSDP engine where flash attention is not installed: what then is slow, done in few calls.

Log-probabilities: verl 0.9.1 takes them by flash attention's Triton cross-entropy or, without it,
token by token (verl/utils/torch_functional.py:163 `logprobs_from_logits_v2`). The vision tower:
transformers hands each of its windows to torch's attention by itself, 64 of them for an image of
840 x 840 in each of 28 layers. Both are thousands of small kernels, and as many nodes of autograd,
for every micro-batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from verl.workers.engine.fsdp import transformer_impl

from rcot_rl.training import on_policy_loss  # noqa: F401  registers the loss with verl
from rcot_rl.training.shared_vision import share_vision

CHUNK_TOKENS = 1024
"""Rows of logits that are in fp32 at once: 0.6 GB with Qwen2.5-VL's vocabulary."""
WINDOWS = "rcot_windows_as_flash"
"""The vision tower's attention: one whose name has `flash` is given all windows at once."""


class InFewCalls:
    """Mixed into verl's engine, before it."""

    def _build_module(self) -> torch.nn.Module:
        module = super()._build_module()  # type: ignore[misc]
        windows_together(module)
        share_vision(module)
        return module

    def prepare_model_outputs(self, *args: Any, **kwargs: Any) -> Any:
        """verl's own, with one function of its module exchanged while it runs."""
        original = transformer_impl.logprobs_from_logits
        transformer_impl.logprobs_from_logits = log_probs_of_labels
        try:
            return super().prepare_model_outputs(*args, **kwargs)  # type: ignore[misc]
        finally:
            transformer_impl.logprobs_from_logits = original


def log_probs_of_labels(
    logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True
) -> torch.Tensor:
    """log softmax(logits)[labels], fp32, as verl's `logprobs_from_logits`.

    logits: [..., V]; labels: [...]. inplace_backward is an option of flash attention's kernel and
    has no meaning here. Logits of 16 bits are taken to fp32 in pieces, and again for the gradient,
    so that no copy of all of them in fp32 is kept.
    """
    if logits.dtype in (torch.float32, torch.float64):
        chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return chosen - logits.logsumexp(-1)
    rows, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    pieces = [
        checkpoint(_in_fp32, some, of, use_reentrant=False)
        for some, of in zip(rows.split(CHUNK_TOKENS), wanted.split(CHUNK_TOKENS), strict=True)
    ]
    return torch.cat(pieces).view(labels.shape)


def _in_fp32(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def windows_together(model: torch.nn.Module) -> None:
    """Have the vision tower of a Qwen2.5-VL attend in all windows of one length at once."""
    own = None
    for module in model.modules():
        if type(module).__name__ == "Qwen2_5_VLVisionAttention":
            if own is None:
                # a copy, for the layers alone: of the model's own configuration verl makes another
                # model when it saves, and transformers looks such a name up as a kernel
                own = copy.copy(module.config)
                own._attn_implementation = WINDOWS
            module.config = own


def attend_in_windows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each of the windows that `cu_seq_lens_q` [windows + 1] bounds, not causal.

    query, key, value: [1, heads, patches, size of a head]. Returns [1, patches, heads, size].
    """
    order, back, groups = _windows(cu_seq_lens_q)
    sorted_ = [x[0].index_select(1, order) for x in (query, key, value)]
    parts, start = [], 0
    for count, length in groups:
        end = start + count * length
        q, k, v = (x[:, start:end].unflatten(1, (count, length)).transpose(0, 1) for x in sorted_)
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)  # [count, heads, length, size]
        parts.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(parts).index_select(0, back).unsqueeze(0), None


AttentionInterface.register(WINDOWS, attend_in_windows)


def _windows(bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Of windows' bounds: the order of patches in which windows of one length lie together, the way
    back, and (how many, how long) of each group; kept with the tensor, which all layers share."""
    known = getattr(bounds, "_rcot_windows", None)
    if known is None:
        lengths = bounds.diff()
        kinds, counts = lengths.unique(return_counts=True)
        groups = list(zip(counts.tolist(), kinds.tolist(), strict=True))
        orders = [
            (bounds[:-1][lengths == length, None] + torch.arange(length, device=bounds.device))
            for _, length in groups
        ]
        order = torch.cat([o.flatten() for o in orders])
        known = bounds._rcot_windows = (order, order.argsort(), groups)
    return known
