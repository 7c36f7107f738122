"""Encode an image once for all responses of its group.

The responses of a GRPO group share one prompt, so that a micro-batch holds the same image several
times. The vision tower then repeats its work for each copy: of Qwen2.5-VL-3B's forward pass on an
840 x 840 image and 550 tokens of text, the tower is about a third. Here it runs on the distinct
images only, and each sequence gets its copy of the features; autograd adds the copies' gradients.
Outputs and gradients are those of the repeated work, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch

TOWER = "Qwen2_5_VisionTransformerPretrainedModel"


def share_vision(model: torch.nn.Module) -> None:
    """Make every Qwen2.5-VL vision tower in `model` encode each distinct image of a call once."""
    for module in model.modules():
        if type(module).__name__ == TOWER:
            _share(module)


def _share(tower: torch.nn.Module) -> None:
    encode = tower.forward

    def forward(hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        """Features of the media in `hidden_states` [patches, values], bounded by `grid_thw`."""
        pieces = hidden_states.split(grid_thw.prod(-1).tolist())
        first, copy_of = distinct(pieces, grid_thw.tolist())
        if len(first) == len(pieces):
            return encode(hidden_states, grid_thw=grid_thw, **kwargs)
        out = encode(
            torch.cat([pieces[i] for i in first]), grid_thw=grid_thw[first].contiguous(), **kwargs
        )
        lengths = [len(pieces[i]) for i in first]
        merge = tower.spatial_merge_size**2
        out.pooler_output = _repeat(out.pooler_output, [n // merge for n in lengths], copy_of)
        out.last_hidden_state = _repeat(out.last_hidden_state, lengths, copy_of)
        return out

    tower.forward = forward  # type: ignore[method-assign]


def distinct(
    pieces: tuple[torch.Tensor, ...], grids: list[list[int]]
) -> tuple[list[int], list[int]]:
    """Find equal media among `pieces`.

    Returns:
        The index of each distinct piece, and for every piece its place in that list.
    """
    first: list[int] = []
    copy_of: list[int] = []
    for i, piece in enumerate(pieces):
        # a group's sequences are neighbours: the newest distinct piece is nearly always the one
        for place in reversed(range(len(first))):
            if grids[first[place]] == grids[i] and torch.equal(pieces[first[place]], piece):
                copy_of.append(place)
                break
        else:
            copy_of.append(len(first))
            first.append(i)
    return first, copy_of


def _repeat(features: torch.Tensor, lengths: list[int], copy_of: list[int]) -> torch.Tensor:
    parts = features.split(lengths)
    return torch.cat([parts[place] for place in copy_of])
