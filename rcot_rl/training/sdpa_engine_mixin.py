"""Batched kernels for verl's FSDP engine where flash attention is not installed.

Without flash attention, verl 0.9.1 computes log-probabilities token by token, and transformers
calls torch's attention once per window of the vision tower: 64 windows for an image of 840 x 840,
in each of 28 layers. Both launch thousands of small kernels, with as many autograd nodes, for every
micro-batch. The mixin computes each in a few calls.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from verl.utils import tensordict_utils
from verl.utils.model import extract_multi_modal_inputs
from verl.utils.torch_functional import entropy_from_logits

from rcot_rl.errors import InputError
from rcot_rl.training import on_policy_loss  # noqa: F401  registers the loss with verl
from rcot_rl.training.packed_attention import (
    PackedRow,
    leaders_of,
    pack_language_model,
    packed_row,
)
from rcot_rl.training.shared_vision import share_vision
from rcot_rl.training.verl_patches import log_probs_by

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 1024
"""Rows of logits converted to fp32 at once: 0.6 GB with Qwen2.5-VL's vocabulary."""
WINDOWS = "rcot_windows_as_flash"
"""The vision tower's attention. transformers passes all windows at once to a name with `flash`."""


class SdpaEngineMixin:
    """Base class to put before verl's engine.

    With verl's `use_remove_padding`, micro-batches are packed (`packed_attention.py`).
    """

    use_remove_padding: bool
    _packing: Any = None
    """The packed language model's configuration; None without packing."""

    def _build_module(self) -> torch.nn.Module:
        packing = self.use_remove_padding
        # verl would replace the attention layers' forward by one that needs flash attention
        self.use_remove_padding = False
        try:
            module = super()._build_module()  # type: ignore[misc]  # of verl's engine
        finally:
            self.use_remove_padding = packing
        layers, towers = batch_windows(module), share_vision(module)
        if packing:
            self._packing = pack_language_model(module)
            if self._packing is None:
                raise InputError(
                    f"needs Qwen2.5-VL, and this model is {type(module).__name__}; set it to false",
                    key="grpo.packing",
                )
        logger.info(
            "SDPA engine: %d vision layers with batched windows, %d towers encode distinct images, "
            "packing %s",
            layers,
            towers,
            "on" if packing else "off",
        )
        return module

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict, dict]:
        """Return what verl's engine does; with packing, one row that has each prompt once."""
        inputs, outputs = super().prepare_model_inputs(micro_batch)  # type: ignore[misc]  # as above
        if self._packing is None:
            return inputs, outputs
        offsets = micro_batch["input_ids"].offsets()
        lengths = offsets.diff().tolist()
        prompts = list(micro_batch["prompts"].unbind())
        positions = [
            inputs["position_ids"][:, 0, start : start + len(prompt)]
            for start, prompt in zip(offsets[:-1].tolist(), prompts, strict=True)
        ]
        column = micro_batch.get("multi_modal_inputs", None)  # absent without images
        column = [{}] * len(lengths) if column is None else column
        media = [getattr(one, "data", one) or {} for one in column]
        row = packed_row(
            lengths,
            [total - len(prompt) for total, prompt in zip(lengths, prompts, strict=True)],
            leaders_of(prompts, positions, media),
            inputs["input_ids"].device,
        )
        self._packing.packed_row = outputs["packed_row"] = row
        inputs["input_ids"] = inputs["input_ids"].index_select(1, row.kept)
        inputs["position_ids"] = inputs["position_ids"].index_select(2, row.kept)
        return inputs | extract_multi_modal_inputs(media, row.leaders), outputs

    def prepare_model_outputs(
        self, output: Any, output_args: dict, micro_batch: Any, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Return what verl's engine does, with log-probabilities computed in chunks.

        With packing, log-probabilities and entropies of tokens outside the responses are 0.
        """
        row = output_args.get("packed_row")
        if row is not None:
            return _response_outputs(output.logits[0], row, output_args, micro_batch)
        with log_probs_by(label_log_probs):
            return super().prepare_model_outputs(  # type: ignore[misc]  # as above
                output, output_args, micro_batch, *args, **kwargs
            )


def _response_outputs(
    row_logits: torch.Tensor, row: PackedRow, output_args: dict, micro_batch: Any
) -> dict[str, torch.Tensor]:
    """Compute log-probabilities, and entropies if asked, of the responses' tokens.

    Args:
        row_logits: [row, V].
        row: The packed row.
        output_args: verl's labels and temperature of all tokens.
        micro_batch: The sequences.

    Returns:
        `log_probs` and `entropy`, jagged [sequences, tokens] like the sequences.
    """
    for option in ("distillation_use_topk", "distillation_only", "calculate_sum_pi_squared"):
        if tensordict_utils.get_non_tensor_data(micro_batch, option, False):
            raise InputError(f"does not support verl's {option}", key="grpo.packing")
    where, offsets = row.predicting, micro_batch["input_ids"].offsets()
    logits = row_logits.index_select(0, row.place[where])
    if not output_args["temperature_is_one"]:
        temperature = output_args["temperature_rmpad"][where].unsqueeze(-1)
        logits = (logits / temperature).to(logits.dtype)

    def spread(values: torch.Tensor) -> torch.Tensor:
        everywhere = values.new_zeros(len(row.place)).index_copy(0, where, values)
        return torch.nested.nested_tensor_from_jagged(everywhere, offsets)

    labels = output_args["input_ids_rmpad_rolled"][where]
    results = {"log_probs": spread(label_log_probs(logits, labels))}
    if tensordict_utils.get_non_tensor_data(micro_batch, "calculate_entropy", False):
        results["entropy"] = spread(entropy_from_logits(logits))
    return results


def label_log_probs(
    logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True
) -> torch.Tensor:
    """Compute log softmax(logits) at the labels, as verl's `logprobs_from_logits`.

    16-bit logits are converted to fp32 in chunks, and again for the gradient, so that no fp32 copy
    of all of them is kept.

    Args:
        logits: [..., V].
        labels: int64 [...].
        inplace_backward: An option of flash attention's kernel; without meaning here.

    Returns:
        float32 [...]; float64 for float64 logits.
    """
    if logits.dtype in (torch.float32, torch.float64):
        chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return chosen - logits.logsumexp(-1)
    rows, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    chunks = [
        checkpoint(_fp32_log_probs, some_rows, some_targets, use_reentrant=False)
        for some_rows, some_targets in zip(
            rows.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True
        )
    ]
    return torch.cat(chunks).view(labels.shape)


def _fp32_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def batch_windows(model: torch.nn.Module) -> int:
    """Make the Qwen2.5-VL vision tower attend in all windows of one length at once.

    Returns:
        Number of attention layers changed; 0 for a model without that tower.
    """
    layers: list[Any] = [
        m for m in model.modules() if type(m).__name__ == "Qwen2_5_VLVisionAttention"
    ]
    if layers:
        # only the layers get this copy: verl builds another model from the model's own
        # configuration when it saves, and transformers would look the name up as a kernel
        config = copy.copy(layers[0].config)
        config._attn_implementation = WINDOWS
        for layer in layers:
            layer.config = config
    return len(layers)


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
    """Attend within each window, not causally.

    Args:
        module: The attention layer; not used.
        query: [1, heads, patches, head size]; `key` and `value` have the same shape.
        key: See `query`.
        value: See `query`.
        attention_mask: Not used; the windows replace it.
        scaling: Factor of the scores.
        cu_seq_lens_q: int [windows + 1], where each window starts and the last one ends.

    Returns:
        [1, patches, heads, head size], and None for the attention weights.
    """
    order, inverse, groups = _window_groups(cu_seq_lens_q)
    ordered = [x[0].index_select(1, order) for x in (query, key, value)]
    outputs, start = [], 0
    for count, length in groups:
        end = start + count * length
        q, k, v = (x[:, start:end].unflatten(1, (count, length)).transpose(0, 1) for x in ordered)
        # [count, heads, length, head size]
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(outputs).index_select(0, inverse).unsqueeze(0), None


AttentionInterface.register(WINDOWS, attend_in_windows)


def _window_groups(bounds: Any) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Group windows by length; cached on `bounds`, a tensor that all layers share.

    Args:
        bounds: int tensor [windows + 1], as `cu_seq_lens_q`.

    Returns:
        The order of patches in which windows of one length are adjacent, its inverse, and
        (windows, length) of each group.
    """
    cached = getattr(bounds, "_rcot_windows", None)
    if cached is None:
        lengths = bounds.diff()
        distinct_lengths, counts = lengths.unique(return_counts=True)
        groups = list(zip(counts.tolist(), distinct_lengths.tolist(), strict=True))
        patches = [
            bounds[:-1][lengths == length, None] + torch.arange(length, device=bounds.device)
            for _, length in groups
        ]
        order = torch.cat([p.flatten() for p in patches])
        cached = bounds._rcot_windows = (order, order.argsort(), groups)
    return cached
