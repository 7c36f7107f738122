"""Log-probabilities for verl's FSDP engine where flash attention's kernels are not installed.

verl 0.9.1 takes them by flash attention's Triton cross-entropy or, without it, token by token
(verl/utils/torch_functional.py:163 `logprobs_from_logits_v2`): thousands of small kernels, and as
many nodes of autograd, for every micro-batch. Here they come in a few large pieces.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from verl.workers.engine.fsdp import transformer_impl

CHUNK_TOKENS = 1024
"""Rows of logits that are in fp32 at once: 0.6 GB with Qwen2.5-VL's vocabulary."""


class LogProbsInPieces:
    """Mixed into verl's engine, before it: log-probabilities by `log_probs_of_labels`."""

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
