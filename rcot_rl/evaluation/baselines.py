"""Masks that need no model: what any method must beat. `evaluate_masks` takes them as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from data_pipelines.corpora import Corpus, Expression, Video

CENTRE_SIDE = 0.5
"""The centre box' share of the image's height and of its width."""


def whole_frame(corpus: Corpus, video: Video, expression: Expression) -> np.ndarray:
    """Every pixel of every frame, bool [T, H, W]. Raises CorpusFault without a first frame."""
    return np.ones(_shape(corpus, video), dtype=bool)


def centre_box(corpus: Corpus, video: Video, expression: Expression) -> np.ndarray:
    """A centred box of half the height and width in every frame, bool [T, H, W]."""
    masks = np.zeros(_shape(corpus, video), dtype=bool)
    rows, columns = (_middle(length, CENTRE_SIDE) for length in masks.shape[1:])
    masks[:, rows, columns] = True
    return masks


BASELINES: Mapping[str, Callable[[Corpus, Video, Expression], np.ndarray]] = {
    "whole-frame": whole_frame,
    "centre-box": centre_box,
}


def _shape(corpus: Corpus, video: Video) -> tuple[int, int, int]:
    return (len(video.frames), *corpus.frame_size(video.id, video.frames[0]))


def _middle(length: int, share: float) -> slice:
    inside = max(1, round(length * share))
    first = (length - inside) // 2
    return slice(first, first + inside)
