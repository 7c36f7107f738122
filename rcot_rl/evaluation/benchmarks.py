"""J, F and J&F of a folder of predictions on a benchmark, by its public protocol.

| benchmark       | protocol                                                                       |
| --------------- | ------------------------------------------------------------------------------ |
| ref-youtube-vos | mean over all annotated frames, then over expressions                          |
| mevis           | the same                                                                       |
| reasonvos       | the same; the annotated frames are those that have a PNG                       |
| davis17         | the same, each expression alone (VISA's protocol, which the paper follows)     |
| revos           | J and F of an expression in percent rounded to 2 decimals; means over the      |
|                 | referring and over the reasoning ones; overall is the mean of the two means    |

J&F is the mean of J and F, all in percent. Deviations from the public scripts, which drop
expressions in silence: a missing or unusable prediction scores 0 and is listed; an expression whose
ground truth is defective is left out of the means and listed as unscorable.

ReVOS' expressions without a target (type 2) are in no mean of J or F; like those of any benchmark
they are reported apart, with N-Acc (how many are left empty in every frame) beside T-Acc (how many
of those with a target are not).

Left out: DAVIS' own route over four merged annotators, and ReVOS' accuracy and robustness scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.corpora import Corpus, CorpusFault, Expression, Video, open_corpus
from data_pipelines.parallel import ordered_map
from rcot_rl.errors import InputError
from rcot_rl.evaluation.baselines import BASELINES
from rcot_rl.evaluation.jf import jf_video
from rcot_rl.evaluation.keyframes import keyframe_figures
from rcot_rl.evaluation.predictions import Predicted, read_masks, read_trace
from rcot_rl.evaluation.summary import summarise
from rcot_rl.paths import check_path

__all__ = ["BASELINES", "Predict", "Progress", "evaluate", "evaluate_masks"]

Predict = Callable[[Corpus, Video, Expression], np.ndarray]
"""A method to be scored: the expression's masks, bool [T, H, W] in source size."""

Progress = Callable[[int, int], None]
"""Called with (done, total) after each expression."""


class Pair(NamedTuple):
    """One sentence about one video."""

    video: Video
    expression: Expression


@dataclass
class Truth:
    """The ground truth of one expression."""

    masks_thw: np.ndarray
    """bool [T, H, W], the union of the targets."""

    annotated: np.ndarray
    """bool [T]: frames that are scored."""


@dataclass
class Scored:
    """One expression's line of the result, and what is to be listed."""

    row: dict[str, Any] | None
    """None when the ground truth is defective."""

    missing: list[str] = field(default_factory=list)
    faults: list[dict[str, str]] = field(default_factory=list)
    unscorable: list[dict[str, str]] = field(default_factory=list)


def evaluate(
    dataset: str,
    corpus_root: Path,
    split: str,
    predictions_dir: Path,
    limit: int | None = None,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score PREDICTIONS_DIR/<video>/<expression_id>/<frame>.png against a corpus.

    limit: only the first expressions in the corpus' order. workers: processes. Returns JSON values:
    those of `summary.summarise`, and

        benchmark, root, split, limit     what was scored; root is the corpus' folder
        missing      `video/expression` or `video/expression/frame` without a prediction
        faults       [{"place", "reason"}] predictions and traces that cannot be used
        unscorable   [{"place", "reason"}] expressions whose ground truth is defective

    Raises InputError for a missing folder, a limit below 1 and a corpus that is unknown, unreadable
    or published without masks.
    """
    corpus = open_corpus(dataset, corpus_root, split)
    check_path(predictions_dir)
    root = Path(predictions_dir)
    if not root.is_dir():
        raise InputError("no such folder (of predictions)", file=root)

    def score(pair: Pair) -> Scored:
        return _score_files(corpus, pair, root)

    result = _run(corpus, score, limit, workers, progress)
    return {**result, "predictions_dir": str(root)}


def evaluate_masks(
    dataset: str,
    corpus_root: Path,
    split: str,
    predict: Predict,
    limit: int | None = None,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score masks that `predict` makes, by the same rules and with the same result.

    Raises ValueError for masks that are not [T, H, W] of the video; InputError as `evaluate`.
    """
    corpus = open_corpus(dataset, corpus_root, split)

    def score(pair: Pair) -> Scored:
        return _score_made(corpus, pair, predict)

    return _run(corpus, score, limit, workers, progress)


def _run(
    corpus: Corpus,
    score: Callable[[Pair], Scored],
    limit: int | None,
    workers: int,
    progress: Progress | None,
) -> dict[str, Any]:
    if limit is not None and limit < 1:
        raise InputError(f"must be at least 1, not {limit}", key="limit")
    pairs = [Pair(v, e) for v in corpus.videos() for e in v.expressions][:limit]
    if not pairs:
        raise InputError("the corpus has no expressions", file=corpus.expressions_file)
    if not corpus.has_masks:
        raise InputError(
            f"{corpus.dataset} '{corpus.split}' is published without masks; only its server can "
            "score it",
            file=corpus.root,
        )
    corpus.load()
    scored: list[Scored] = []
    for one in ordered_map(score, pairs, workers):
        scored.append(one)
        if progress is not None:
            progress(len(scored), len(pairs))
    return {
        "benchmark": corpus.dataset,
        "root": str(corpus.root),
        "split": corpus.split,
        "limit": limit,
        **summarise(corpus.dataset, [s.row for s in scored if s.row is not None]),
        "missing": [m for s in scored for m in s.missing],
        "faults": [f for s in scored for f in s.faults],
        "unscorable": [u for s in scored for u in s.unscorable],
    }


def _score_files(corpus: Corpus, pair: Pair, root: Path) -> Scored:
    video, expression = pair
    try:
        truth = _truth(corpus, pair)
        size = truth.masks_thw.shape[1:]
        predicted = read_masks(root, video.id, expression.id, video.frames, size)
        # A frame without ground truth may be missing.
        listed = set(_scored_names(pair, truth))
        predicted.missing = [m for m in predicted.missing if m in listed]
        row = _row(corpus, pair, truth, predicted)
        trace, wrong = read_trace(root, video.id, expression.id, len(video.frames))
        if wrong is not None:
            place = f"{video.id}/{expression.id}/trace.json"
            predicted.faults.append({"place": place, "reason": wrong})
        if trace is not None:
            there = truth.annotated[trace.keyframe]
            objects = corpus.masks(video, expression, trace.keyframe) if there else None
            areas = np.where(truth.annotated, truth.masks_thw.sum(axis=(1, 2)), -1)
            row |= keyframe_figures(trace, areas, objects) | {"segmenter": trace.segmenter}
    except CorpusFault as fault:
        return _unscorable(pair, fault)
    return Scored(row, predicted.missing, predicted.faults)


def _score_made(corpus: Corpus, pair: Pair, predict: Predict) -> Scored:
    try:
        truth = _truth(corpus, pair)
    except CorpusFault as fault:
        return _unscorable(pair, fault)
    masks = np.asarray(predict(corpus, *pair))
    if masks.shape != truth.masks_thw.shape:
        wanted = truth.masks_thw.shape
        raise ValueError(f"{pair.video.id}/{pair.expression.id}: {masks.shape}, not {wanted}")
    everywhere = np.ones(len(masks), dtype=bool)
    return Scored(_row(corpus, pair, truth, Predicted(masks != 0, everywhere)))


def _truth(corpus: Corpus, pair: Pair) -> Truth:
    """The union of the targets in each frame. Raises CorpusFault."""
    video, expression = pair
    place = f"{corpus.root} {video.id}/{expression.id}"
    if not video.frames:
        raise CorpusFault("no_frames", place)
    size = corpus.frame_size(video.id, video.frames[0])
    masks = np.zeros((len(video.frames), *size), dtype=bool)
    annotated = np.ones(len(video.frames), dtype=bool)
    for t in range(len(video.frames)):
        try:
            objects = corpus.masks(video, expression, t)
        except CorpusFault as fault:
            if fault.reason != "missing_mask":
                raise
            annotated[t] = False
            continue
        for mask in objects.values():
            if mask.shape != size:
                raise CorpusFault("frame_size", place, f"frame {video.frames[t]} is {mask.shape}")
            masks[t] |= mask
    if not annotated.any():
        raise CorpusFault("no_annotation", place)
    return Truth(masks, annotated)


def _scored_names(pair: Pair, truth: Truth) -> Sequence[str]:
    name = f"{pair.video.id}/{pair.expression.id}"
    frames = zip(pair.video.frames, truth.annotated, strict=True)
    return [name, *(f"{name}/{frame}" for frame, there in frames if there)]


def _unscorable(pair: Pair, fault: CorpusFault) -> Scored:
    place = f"{pair.video.id}/{pair.expression.id}"
    return Scored(None, unscorable=[{"place": place, "reason": str(fault)}])


def _row(corpus: Corpus, pair: Pair, truth: Truth, predicted: Predicted) -> dict[str, Any]:
    """The expression's line; J and F are fractions here, `summarise` makes percent of them."""
    video, expression = pair
    at, usable = truth.annotated, predicted.usable[truth.annotated]
    jaccard, boundary = jf_video(truth.masks_thw[at], predicted.masks_thw[at])
    return {
        "video": video.id,
        "expression_id": expression.id,
        "expression": expression.text,
        "subset": _subset(corpus, pair),
        "J": float(np.where(usable, jaccard, 0.0).mean()),
        "F": float(np.where(usable, boundary, 0.0).mean()),
        "n_frames": int(at.sum()),
        "n_unusable_frames": int((~usable).sum()),
        "empty": bool(usable.all() and not predicted.masks_thw[at].any()),
        "found": bool(predicted.masks_thw[at].any()),
    }


def _subset(corpus: Corpus, pair: Pair) -> str:
    if corpus.dataset != "revos":
        targets = len(pair.expression.object_ids)
        return ("no_target", "single_target", "multi_target")[min(targets, 2)]
    names = {0: "referring", 1: "reasoning", 2: "no_target"}
    if pair.expression.type_id not in names:
        key = f"videos.{pair.video.id}.expressions.{pair.expression.id}.type_id"
        raise InputError("must be 0, 1 or 2", file=corpus.expressions_file, key=key)
    return names[pair.expression.type_id]
