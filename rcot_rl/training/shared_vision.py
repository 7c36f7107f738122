"""Encode an image once for all responses of its group.

The responses of a GRPO group share one prompt, so a micro-batch holds the same image several times,
and the vision tower repeats its work for each copy. The tower takes about a third of
Qwen2.5-VL-3B's forward pass on an 840 x 840 image and 550 text tokens. Here it runs on the distinct
images only, and each sequence gets a copy of the features; autograd adds up the copies' gradients.
Outputs and gradients equal those of the repeated work, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch

TOWER = "Qwen2_5_VisionTransformerPretrainedModel"


def share_vision(model: torch.nn.Module) -> int:
    """Make every Qwen2.5-VL vision tower in `model` encode each distinct image of a call once.

    Returns:
        Number of towers changed.
    """
    towers = [module for module in model.modules() if type(module).__name__ == TOWER]
    for tower in towers:
        _share(tower)
    return len(towers)


def _share(tower: Any) -> None:
    encode = tower.forward

    def forward(hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        """Encode media.

        Args:
            hidden_states: [patches, values] of all media.
            grid_thw: int [media, 3], the patches of each medium in time, height and width.
        """
        pieces = hidden_states.split(grid_thw.prod(-1).tolist())
        first, copy_of = distinct(pieces, grid_thw.tolist())
        if len(first) == len(pieces):
            return encode(hidden_states, grid_thw=grid_thw, **kwargs)
        out = encode(
            torch.cat([pieces[i] for i in first]), grid_thw=grid_thw[first].contiguous(), **kwargs
        )
        lengths = [len(pieces[i]) for i in first]
        merged = tower.spatial_merge_size**2
        out.pooler_output = _repeat(out.pooler_output, [n // merged for n in lengths], copy_of)
        out.last_hidden_state = _repeat(out.last_hidden_state, lengths, copy_of)
        return out

    tower.forward = forward


def distinct(
    pieces: tuple[torch.Tensor, ...], grids: list[list[int]]
) -> tuple[list[int], list[int]]:
    """Find equal media.

    Args:
        pieces: [patches, values] of each medium.
        grids: Its patches in time, height and width; media of different shapes are never equal.

    Returns:
        The index of each distinct piece, and for every piece its position in that list.
    """
    first: list[int] = []
    copy_of: list[int] = []
    for i, piece in enumerate(pieces):
        # a group's sequences are adjacent: the newest distinct piece is nearly always the match
        for position in reversed(range(len(first))):
            if grids[first[position]] == grids[i] and torch.equal(pieces[first[position]], piece):
                copy_of.append(position)
                break
        else:
            copy_of.append(len(first))
            first.append(i)
    return first, copy_of


def _repeat(features: torch.Tensor, lengths: list[int], copy_of: list[int]) -> torch.Tensor:
    parts = features.split(lengths)
    return torch.cat([parts[position] for position in copy_of])
