"""Ref-DAVIS17 by the official route: DAVIS' unsupervised evaluation for each of four annotators.

ReferFormer and VideoLISA score this way. Each object has four expressions: two annotators described
it after the first frame and after the full video. These count as four annotators; expression
4 * k + a of a video, in the file's order, is object k by annotator a.

1. The masks of an annotator's expressions are merged into one label image per frame: the largest of
   background 0.1 and the objects' scores wins. Binary masks have score 1, and the first object wins
   a tie.
2. DAVIS 2017's evaluation treats the labels as proposals without order, which it assigns to the
   objects so that the sum of J&F is largest. Void pixels (label 255) are ignored. All frames count,
   the first and the last included.
3. J and F are means over frames, then over the objects of all videos, then over annotators.

As in the public code, the objects are the labels up to the largest one in the first frame, so an
object that appears later and has a higher label is not scored; proposals that are missing are
empty; more proposals than objects may be assigned. The code exits if a frame has no prediction;
here a missing or unusable mask counts 0 for every object, as in the main figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from data_pipelines.corpora import CorpusFault, Expression, Video
from data_pipelines.corpora.davis17 import Davis17
from data_pipelines.parallel import ordered_map
from rcot_rl.evaluation.jf import jf_video
from rcot_rl.evaluation.predictions import Predicted
from rcot_rl.evaluation.truth import clip_size

ANNOTATORS = (
    "annotator 1, first frame",
    "annotator 1, full video",
    "annotator 2, first frame",
    "annotator 2, full video",
)
MAX_PROPOSALS = 20
"""DAVIS' evaluation refuses more."""
VOID = 255

ReadMasks = Callable[[Video, Expression, tuple[int, int]], Predicted]
"""Returns an expression's masks at size (H, W). May raise CorpusFault."""


class ObjectScores(NamedTuple):
    """J and F of the objects of one video, as fractions, float64 [n_objects]."""

    jaccard: np.ndarray
    boundary: np.ndarray
    n_unusable: int
    """Number of masks without a usable prediction."""


def official_figures(corpus: Davis17, read: ReadMasks, workers: int) -> dict[str, Any]:
    """Score all expressions of a corpus by the official route.

    Returns:
        Scores in percent; None if the corpus does not allow this evaluation:

            J, F, J&F       means over annotators
            per_annotator   [{annotator, J, F, J&F, n_objects, n_unusable}]; empty if not scored.
                            n_unusable: masks that count 0, since they are missing or unusable
            reason          why there are no scores; else None
    """
    videos = corpus.videos()
    reason = next((r for r in map(_structure_fault, videos) if r is not None), None)
    if reason is not None:
        return not_scored(f"{corpus.expressions_file}: {reason}")

    def score(video: Video) -> list[ObjectScores]:
        return _video_scores(corpus, video, read)

    try:
        per_video = list(ordered_map(score, videos, workers, chunk=1))
    except CorpusFault as fault:
        return not_scored(str(fault))
    if not any(len(scores[0].jaccard) for scores in per_video):
        return not_scored(f"{corpus.annotations_root}: no first frame shows an object")
    annotators = []
    for index, name in enumerate(ANNOTATORS):
        parts = [scores[index] for scores in per_video]
        jaccard = np.concatenate([part.jaccard for part in parts])
        boundary = np.concatenate([part.boundary for part in parts])
        counts = {"n_objects": len(jaccard), "n_unusable": sum(part.n_unusable for part in parts)}
        annotators.append({"annotator": name, **_percent(jaccard, boundary), **counts})
    means = {k: float(np.mean([a[k] for a in annotators])) for k in ("J", "F", "J&F")}
    return {**means, "per_annotator": annotators, "reason": None}


def not_scored(reason: str) -> dict[str, Any]:
    """Return the result of `official_figures` without scores."""
    return {"J": None, "F": None, "J&F": None, "per_annotator": [], "reason": reason}


def assign_objects(
    truth_thw: np.ndarray, merged_thw: np.ndarray, usable: np.ndarray
) -> ObjectScores:
    """Assign proposals to objects by DAVIS' unsupervised protocol.

    Args:
        truth_thw: Labels of the objects, uint8 [T, H, W]; 0 background, 255 void.
        merged_thw: Labels of the proposals, uint8 [T, H, W]; 0 background.
        usable: bool [n, T]: False where proposal k + 1 has no usable mask, which then counts 0.
    """
    known = truth_thw != VOID
    first = truth_thw[0]
    n_objects = int(first[known[0]].max(initial=0))
    n_proposals = max(int(merged_thw.max()), n_objects)
    jaccard = np.zeros((n_proposals, n_objects, len(truth_thw)))
    boundary = np.zeros_like(jaccard)
    for p in range(n_proposals):
        proposal = (merged_thw == p + 1) & known
        for k in range(n_objects):
            jaccard[p, k], boundary[p, k] = jf_video(truth_thw == k + 1, proposal)
        if p < len(usable):
            jaccard[p][:, ~usable[p]] = boundary[p][:, ~usable[p]] = 0.0
    gain = (jaccard.mean(axis=2) + boundary.mean(axis=2)) / 2
    assigned = linear_sum_assignment(-gain)
    n_unusable = int(np.count_nonzero(~usable))
    return ObjectScores(jaccard[assigned].mean(axis=1), boundary[assigned].mean(axis=1), n_unusable)


def _structure_fault(video: Video) -> str | None:
    """Return why the expressions of a video are not four annotators' descriptions; else None."""
    key, expressions = f"videos.{video.id}", video.expressions
    if not video.frames:
        return f"{key}.frames: the video has no frames"
    if not expressions or len(expressions) % len(ANNOTATORS):
        return f"{key}.expressions: {len(expressions)} expressions are not four per object"
    objects = [sorted(e.object_ids for e in expressions[a :: len(ANNOTATORS)]) for a in range(4)]
    if any(described != objects[0] for described in objects):
        return f"{key}.expressions: the four annotators do not describe the same objects"
    if len(objects[0]) > MAX_PROPOSALS:
        return (
            f"{key}.expressions: more than {MAX_PROPOSALS} objects, which DAVIS' evaluation refuses"
        )
    return None


def _video_scores(corpus: Davis17, video: Video, read: ReadMasks) -> list[ObjectScores]:
    """Return the scores of each annotator. Raises CorpusFault."""
    labels = [corpus.label_image(video, t) for t in range(len(video.frames))]
    if len({image.shape for image in labels}) > 1:
        place = f"{corpus.annotations_root}/{video.id}"
        raise CorpusFault("mask_size", place, "label images of several sizes")
    truth = np.stack(labels)
    for expression in video.expressions:
        size = clip_size(corpus, video, expression)
        if size not in (None, truth.shape[1:]):
            place = f"{corpus.annotations_root}/{video.id}"
            detail = f"label images of another size than the masks of expression {expression.id}"
            raise CorpusFault("mask_size", place, detail)
    scores = []
    for annotator in range(len(ANNOTATORS)):
        expressions = video.expressions[annotator :: len(ANNOTATORS)]
        merged, usable = _merged(video, expressions, read, truth.shape)
        scores.append(assign_objects(truth, merged, usable))
    return scores


def _merged(
    video: Video, expressions: Sequence[Expression], read: ReadMasks, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the merged labels, uint8 [T, H, W], and which masks are usable, bool [n, T]."""
    length, height, width = shape
    merged = np.zeros(shape, dtype=np.uint8)
    usable = np.zeros((len(expressions), length), dtype=bool)
    for k, expression in enumerate(expressions):
        predicted = read(video, expression, (height, width))
        merged[predicted.masks_thw & (merged == 0)] = k + 1
        usable[k] = predicted.usable
    return merged, usable


def _percent(jaccard: np.ndarray, boundary: np.ndarray) -> dict[str, float]:
    scores = 100 * float(jaccard.mean()), 100 * float(boundary.mean())
    return {"J": scores[0], "F": scores[1], "J&F": (scores[0] + scores[1]) / 2}
