"""Ground truth in the place of the policy's keyframe or boxes, for upper bounds of the pipeline.

The keyframe is the frame with the largest union of the targets' masks, the first on a tie. Boxes
and points are those of `data_pipelines.geometry`, of the targets visible in the keyframe. Masks are
read as the public scripts read them, so that bounds and scores use the same ground truth.

Frames without usable ground truth are never used: boxes are then taken from the nearest frame that
has it, the earlier one on a tie, which becomes the keyframe.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Self

import numpy as np

from data_pipelines.corpora.corpus import Corpus, CorpusFault, Expression, Video
from data_pipelines.geometry import ObjectTruth, ground, keyframe
from rcot_rl.errors import InputError
from rcot_rl.recipe.inference_section import (
    ORACLE_BOTH,
    ORACLE_BOXES,
    ORACLE_KEYFRAME,
    ORACLES,
)

_READING = threading.Lock()
"""Corpora cache masks, and are not made for several threads."""


@dataclass(frozen=True)
class Oracle:
    """The ground truth of one expression, and what it gives."""

    corpus: Corpus
    video: Video
    expression: Expression
    canvas: int
    """Side in pixels of the canvas of boxes and points."""
    gives_keyframe: bool
    gives_objects: bool

    @classmethod
    def of(
        cls,
        variant: str | None,
        corpus: Corpus,
        video: Video,
        expression: Expression,
        canvas: int,
    ) -> Self | None:
        """Return the oracle of a prediction; None if its variant is not one of `ORACLES`."""
        if variant not in ORACLES:
            return None
        return cls(
            corpus,
            video,
            expression,
            canvas,
            gives_keyframe=variant in (ORACLE_KEYFRAME, ORACLE_BOTH),
            gives_objects=variant in (ORACLE_BOXES, ORACLE_BOTH),
        )

    def keyframe(self) -> int:
        """Return the true keyframe; 0 if no frame shows a target. Raises InputError."""
        areas = np.full(len(self.video.frames), -1)
        for t in range(len(areas)):
            masks = self._visible(t)
            if masks is not None:
                areas[t] = np.count_nonzero(np.logical_or.reduce(masks)) if masks else 0
        if areas.max(initial=-1) < 0:
            raise self._without_truth()
        return keyframe(areas) or 0

    def objects(self, frame: int) -> tuple[int, list[ObjectTruth]]:
        """Return the nearest frame with ground truth, and its objects by ascending id.

        Raises InputError.
        """
        for t in sorted(range(len(self.video.frames)), key=lambda t: abs(t - frame)):
            masks = self._visible(t)
            if masks is not None:
                return t, [ground(mask, self.canvas) for mask in masks]
        raise self._without_truth()

    def _visible(self, frame: int) -> list[np.ndarray] | None:
        """Return the targets' masks that are not empty; None without usable ground truth."""
        if self.expression.unlabelled:
            return None
        try:
            with _READING:
                size = self.corpus.frame_size(self.video.id, self.video.frames[frame])
                masks = [
                    self.corpus.published_mask(self.video, anno_id, frame)
                    for anno_id in self.expression.anno_ids
                ]
        except CorpusFault:
            return None
        present = [mask for mask in masks if mask is not None]
        if any(mask.shape != size for mask in present):
            return None
        return [mask for mask in present if mask.any()]

    def _without_truth(self) -> InputError:
        return InputError(
            "no frame has usable ground truth",
            file=self.corpus.expressions_file,
            key=f"videos.{self.video.id}.expressions.{self.expression.id}",
        )
