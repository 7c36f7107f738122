"""Losses that teach what each patch shows, read from embeddings inside the policy.

The loss of the responses alone teaches perception slowly. Two linear heads read from each merged
patch which shape covers it and that shape's box: one from the vision tower's output, and one from a
middle layer of the language model, which also knows the frame's place and since when the shape has
been visible. They are used in training only and are not part of the policy.
"""

from __future__ import annotations

import numpy as np
import torch

from rcot_rl.tiny.policy_data import FRAMES, NAMES
from rcot_rl.tiny.policy_model import IMAGE_CANVAS, MERGE, PATCH, TEMPORAL


def merged_cells(cells: np.ndarray) -> torch.Tensor:
    """Bring [B, T, 8, 8, C] into the order of merged patches: [B * T/2 * 16, 2 * 4, C]."""
    if cells.shape[1] == 1:
        cells = np.repeat(cells, TEMPORAL, axis=1)
    count, time, side, _, width = cells.shape
    blocks = side // MERGE
    split = cells.reshape(count, time // TEMPORAL, TEMPORAL, blocks, MERGE, blocks, MERGE, width)
    ordered = split.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return torch.from_numpy(np.ascontiguousarray(ordered).reshape(-1, TEMPORAL * MERGE**2, width))


class PatchHead(torch.nn.Module):
    """Reads from embeddings of merged patches what their pixels show."""

    def __init__(self, hidden: int, *, time: bool) -> None:
        """Also read frame numbers from videos if `time` is set."""
        super().__init__()
        names, sides = len(NAMES) + 1, IMAGE_CANVAS // PATCH + 1
        self.classes = [names, *[sides] * 4, *([FRAMES] * 2 if time else [])]
        self.linear = torch.nn.Linear(hidden, TEMPORAL * MERGE**2 * sum(self.classes))

    def forward(self, embeddings: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy of names, plus those of the rest where a shape is.

        Args:
            embeddings: float [N, hidden].
            cells: int64 [N, 2 * 4, 7], see `cells_of`.
        """
        out = self.linear(embeddings).float().unflatten(1, (cells.shape[1], -1))
        names, *others = out.split(self.classes, dim=-1)
        loss = torch.nn.functional.cross_entropy(names.flatten(0, 1), cells[..., 0].flatten())
        shown = cells[..., 0] > 0
        for column, logits in enumerate(others, 1):
            share = 1 / 4 if column <= 4 else 1 / 2
            loss = loss + share * torch.nn.functional.cross_entropy(
                logits[shown], cells[..., column][shown]
            )
        return loss
