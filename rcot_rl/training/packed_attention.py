"""Pack a micro-batch's sequences in one row, without padding and with each prompt once.

verl pads the sequences of a micro-batch to the longest one, unless flash attention is installed,
and computes the prompt of a group again for each of its responses. Here all layers except the
attention see each real token once: a response's tokens attend to the prompt of its group, whose
keys and values are gathered for each response. Padding exists inside the attention alone, between
sequences of similar lengths, and to the right of a sequence, so that a causal attention needs no
mask. Outputs and gradients equal those of the repeated work, up to rounding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

PACKED = "rcot_packed_causal"
"""The language model's attention. transformers builds no mask for a name that it does not know."""

_FILL = 0.75
"""Sequences shorter than this share of the longest one of their group start another group."""


@dataclass(frozen=True)
class PackedRow:
    """Where the tokens of some sequences are in one row that has each prompt once.

    "All tokens" are those of the sequences one after the other, with repeated prompts.
    """

    leaders: list[int]
    """The first sequence of each distinct prompt; the others use its prompt."""
    kept: torch.Tensor
    """int [row], the position of each token of the row among all tokens."""
    place: torch.Tensor
    """int [all tokens], the position of each of all tokens in the row."""
    groups: list[tuple[torch.Tensor, torch.Tensor]]
    """For sequences of similar lengths, the place in the row of each token of their padded batch
    [sequences, longest], and the flat indices of the entries that are not padding."""
    order: torch.Tensor
    """int [row], the position of each token of the row among the real entries of all groups."""
    predicting: torch.Tensor
    """int [response tokens], the positions among all tokens that predict a response's token."""


def packed_row(
    lengths: list[int], response_lengths: list[int], leader_of: list[int], device: Any = None
) -> PackedRow:
    """Lay out sequences in one row.

    Args:
        lengths: Tokens of each sequence.
        response_lengths: The last tokens of each sequence that are its response.
        leader_of: The first sequence with the same prompt, for each sequence.
        device: Device of the result.
    """
    size = torch.tensor(lengths)
    start = size.cumsum(0) - size
    prompt = size - torch.tensor(response_lengths)
    sequence = torch.repeat_interleave(torch.arange(len(size)), size)
    offset = torch.arange(len(sequence)) - start[sequence]
    in_prompt = offset < prompt[sequence]
    leader = torch.tensor(leader_of)
    is_kept = ~in_prompt | (leader == torch.arange(len(size)))[sequence]
    source = torch.where(is_kept, torch.arange(len(sequence)), start[leader[sequence]] + offset)
    place = (is_kept.cumsum(0) - 1)[source]
    groups, computed = [], []
    for members in _similar(lengths):
        first, length = start[members, None], size[members, None]
        columns = torch.arange(int(length.max()))
        is_real = columns < length
        # padding repeats its sequence's first token; no real token attends to it
        tokens = first + torch.where(is_real, columns, 0)
        groups.append((place[tokens].to(device), is_real.flatten().nonzero().flatten().to(device)))
        computed.append(tokens[is_real])
    inverse = torch.cat(computed).argsort()
    kept = is_kept.nonzero().flatten()
    # the last token of a prompt predicts the first one of each of its responses
    is_last = offset == size[sequence] - 1
    predicting = ((offset >= prompt[sequence] - 1) & ~is_last).nonzero().flatten()
    return PackedRow(
        leaders=[i for i, first in enumerate(leader_of) if i == first],
        kept=kept.to(device),
        place=place.to(device),
        groups=groups,
        order=inverse[kept].to(device),
        predicting=predicting.to(device),
    )


def leaders_of(
    prompts: list[torch.Tensor], positions: list[torch.Tensor], media: list[dict[str, Any]]
) -> list[int]:
    """Return for each sequence the first one with the same prompt, positions and media.

    Args:
        prompts: int [tokens] of each sequence.
        positions: int [axes, tokens], of the prompt.
        media: Tensors of the sequence's images and videos.
    """
    leaders: list[int] = []
    for i in range(len(prompts)):
        # a group's sequences are adjacent: the newest leader is nearly always the match
        for j in sorted(set(leaders), reverse=True):
            if (
                torch.equal(prompts[i], prompts[j])
                and torch.equal(positions[i], positions[j])
                and media[i].keys() == media[j].keys()
                and all(_equal(media[i][name], media[j][name]) for name in media[i])
            ):
                leaders.append(j)
                break
        else:
            leaders.append(i)
    return leaders


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def pack_language_model(model: torch.nn.Module) -> Any:
    """Make the language model of Qwen2.5-VL attend to packed rows.

    Returns:
        The configuration that its attention layers share; set its `packed_row` before a forward
        pass. None for another model.
    """
    for text_model in model.modules():
        if type(text_model).__name__ == "Qwen2_5_VLTextModel":
            # a copy, since verl builds another model from the original when it saves
            config: Any = copy.copy(text_model.config)
            config._attn_implementation = PACKED
            layers = [m for m in text_model.modules() if type(m).__name__ == "Qwen2_5_VLAttention"]
            for module in (text_model, *layers):
                module.config = config
            return config
    return None


def attend_in_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each sequence of the layer's packed row.

    Args:
        module: The attention layer; its configuration has the row.
        query: [1, heads, row, head size].
        key: [1, key heads, row, head size]; `value` has the same shape.
        value: See `key`.
        attention_mask: Not used.
        scaling: Factor of the scores.

    Returns:
        [1, row, heads, head size], and None for the attention weights.
    """
    row: PackedRow = module.config.packed_row  # type: ignore[union-attr,assignment]
    by_token = [x[0].transpose(0, 1) for x in (query, key, value)]
    grouped = key.shape[1] != query.shape[1]
    outputs = []
    for padded, real in row.groups:
        # [sequences, heads, longest, head size]
        q, k, v = (
            x.index_select(0, padded.flatten()).unflatten(0, padded.shape).transpose(1, 2)
            for x in by_token
        )
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, real))
    return torch.cat(outputs).index_select(0, row.order).unsqueeze(0), None


AttentionInterface.register(PACKED, attend_in_row)


def _similar(lengths: list[int]) -> list[list[int]]:
    """Return the indices of `lengths` in groups, from long to short, of at least `_FILL` each."""
    groups: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or lengths[i] < _FILL * longest:
            groups.append([])
            longest = lengths[i]
        groups[-1].append(i)
    return groups
