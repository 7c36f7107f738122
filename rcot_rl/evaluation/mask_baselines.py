"""Masks that need no model, as a lower bound for every method; see `evaluate_masks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from data_pipelines.corpora import Corpus, CorpusFault, Expression, Video
from rcot_rl.evaluation.truth import clip_size

CENTRE_SIDE = 0.5
"""Side of the centre box as a share of the image's height and width."""


def whole_frame(corpus: Corpus, video: Video, expression: Expression) -> np.ndarray:
    """Return all True masks, bool [T, H, W]. Raises CorpusFault."""
    return np.ones(_shape(corpus, video, expression), dtype=bool)


def centre_box(corpus: Corpus, video: Video, expression: Expression) -> np.ndarray:
    """Return a centred box of half the height and width in every frame, bool [T, H, W]."""
    masks = np.zeros(_shape(corpus, video, expression), dtype=bool)
    rows, columns = (_middle(length, CENTRE_SIDE) for length in masks.shape[1:])
    masks[:, rows, columns] = True
    return masks


BASELINES: Mapping[str, Callable[[Corpus, Video, Expression], np.ndarray]] = {
    "whole-frame": whole_frame,
    "centre-box": centre_box,
}


def _shape(corpus: Corpus, video: Video, expression: Expression) -> tuple[int, int, int]:
    size = clip_size(corpus, video, expression)
    if size is None:
        raise CorpusFault("no_frames", f"{corpus.frames_root} {video.id}")
    return (len(video.frames), *size)


def _middle(length: int, share: float) -> slice:
    inside = max(1, round(length * share))
    first = (length - inside) // 2
    return slice(first, first + inside)
