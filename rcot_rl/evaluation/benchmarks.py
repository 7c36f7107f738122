"""J, F and J&F of predictions on a benchmark, by the benchmark's public protocol.

| benchmark       | protocol                                                                       |
| --------------- | ------------------------------------------------------------------------------ |
| ref-youtube-vos | mean over all annotated frames, then over expressions                          |
| mevis           | the same                                                                       |
| reasonvos       | the same; the annotated frames are those with a PNG                            |
| davis17         | the same, each expression alone (VISA's protocol, which the paper follows)     |
| revos           | J and F of an expression in percent, rounded to 2 decimals; means over the     |
|                 | referring and the reasoning expressions; overall is the mean of the two means  |

J&F is the mean of J and F, all in percent. Every expression stays in the mean:

- A missing or unusable prediction of a frame counts 0 and is listed. In ReVOS the whole expression
  then counts 0, as in the public script; the other scripts skip such expressions or crash.
- Ground truth is read as the public scripts read it: a mask list with more entries than frames is
  scored, and JPEGs are not needed. A frame with missing or unusable ground truth counts 0; in ReVOS
  the whole expression does, as in the public script. Each such defect is listed.
- Any pixel that is not 0 counts as object, as in the public scripts. Values other than 0 and 255
  and unknown names are listed with their likely cause.

ReVOS' expressions without a target (type 2) are excluded from the means of J and F. For every
benchmark, expressions without a target are reported separately, with N-Acc (the share that is empty
in every frame) and T-Acc (the share of the other expressions that is not empty).

Left out: DAVIS' protocol over four merged annotators, and ReVOS' accuracy and robustness scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.corpora import Corpus, CorpusFault, Expression, Video, open_corpus
from data_pipelines.corpora.json_node import repeated_keys
from data_pipelines.parallel import ordered_map
from rcot_rl.errors import InputError
from rcot_rl.evaluation.aggregate import Subset, aggregate
from rcot_rl.evaluation.jf import jf_video
from rcot_rl.evaluation.keyframe_figures import keyframe_figures
from rcot_rl.evaluation.mask_baselines import BASELINES
from rcot_rl.evaluation.predictions import Predicted, first_size, read_masks, read_trace
from rcot_rl.evaluation.truth import Truth, TruthDefect, read_truth, targets_at
from rcot_rl.evaluation.unexpected import Unexpected, looks_inverted, unknown_folders
from rcot_rl.system.paths import check_path

__all__ = ["BASELINES", "Predict", "Progress", "evaluate", "evaluate_masks"]

Predict = Callable[[Corpus, Video, Expression], np.ndarray]
"""A method to score: returns the expression's masks, bool [T, H, W] in source size."""

Progress = Callable[[int, int], None]
"""Called with (done, total) after each expression."""

logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """One expression with its video."""

    video: Video
    expression: Expression


@dataclass
class Scored:
    """The result of one expression: its row and the entries of the lists."""

    row: dict[str, Any]
    missing: list[str] = field(default_factory=list)
    faults: list[dict[str, str]] = field(default_factory=list)
    unexpected: list[Unexpected] = field(default_factory=list)
    defects: list[TruthDefect] = field(default_factory=list)


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

    Args:
        limit: Score only the first expressions in the corpus' order.

    Returns:
        JSON values: those of `aggregate.aggregate`, and

            benchmark, root, split, limit   what was scored; root is the corpus' folder
            missing      `video/expression` or `video/expression/frame` without a prediction
            faults       [{"place", "reason"}] predictions and traces that cannot be used
            unexpected   [{"place", "reason", "cause"}] unknown names and improper values
            defects      [{"file", "key", "reason", "effect", "expressions"}] of the ground truth

    Raises:
        InputError: The folder is missing, the limit is below 1, or the corpus is unknown,
            unreadable or published without masks.
    """
    corpus = open_corpus(dataset, corpus_root, split)
    check_path(predictions_dir)
    root = Path(predictions_dir)
    if not root.is_dir():
        raise InputError("predictions: no such folder", file=root)

    def score(pair: Pair) -> Scored:
        return _score_files(corpus, pair, root)

    result = _run(corpus, score, limit, workers, progress)
    places = [(v.id, e.id) for v in corpus.videos() for e in v.expressions]
    unexpected = [*unknown_folders(root, places), *result["unexpected"]]
    return {**result, "unexpected": unexpected, "predictions_dir": str(root)}


def evaluate_masks(
    dataset: str,
    corpus_root: Path,
    split: str,
    predict: Predict,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score the masks that `predict` returns, by the rules of `evaluate`.

    Raises:
        ValueError: `predict` returned masks that are not [T, H, W] of the video.
        InputError: See `evaluate`.
    """
    corpus = open_corpus(dataset, corpus_root, split)

    def score(pair: Pair) -> Scored:
        return _score_predicted(corpus, pair, predict)

    return _run(corpus, score, limit, workers=1, progress=None)


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
            f"{corpus.dataset} '{corpus.split}' is published without masks; only the benchmark's "
            "server can score it",
            file=corpus.root,
        )
    corpus.load()
    message = "evaluation: %s '%s' at %s, %d expressions, %d processes"
    logger.info(message, corpus.dataset, corpus.split, corpus.root, len(pairs), workers)
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
        **aggregate(corpus.dataset, [s.row for s in scored]),
        "missing": [m for s in scored for m in s.missing],
        "faults": [f for s in scored for f in s.faults],
        "unexpected": [u for s in scored for u in s.unexpected],
        "defects": [*_repeated(corpus), *_listed(corpus, pairs, scored)],
    }


def _repeated(corpus: Corpus) -> Iterator[dict[str, Any]]:
    for key in repeated_keys(corpus.expressions_file):
        yield {
            "file": str(corpus.expressions_file),
            "key": key,
            "reason": "the key occurs several times",
            "effect": "only the last one is read, as by the public scripts",
            "expressions": [],
        }


def _listed(
    corpus: Corpus, pairs: Sequence[Pair], scored: Sequence[Scored]
) -> list[dict[str, Any]]:
    """Return each defect once, with its effect and the expressions that have it."""
    expressions: dict[tuple[TruthDefect, str], list[str]] = {}
    for pair, one in zip(pairs, scored, strict=True):
        for defect in one.defects:
            effect = _effect(corpus, defect, len(pair.video.frames))
            expressions.setdefault((defect, effect), []).append(_name(pair))
    return [
        {
            "file": defect.file,
            "key": defect.key,
            "reason": defect.reason,
            "effect": effect,
            "expressions": names,
        }
        for (defect, effect), names in expressions.items()
    ]


def _effect(corpus: Corpus, defect: TruthDefect, n_frames: int) -> str:
    if n_frames and not defect.frames:
        return "does not change the score"
    if corpus.dataset == "revos" or defect.frames == n_frames:
        return "the expression counts 0"
    return f"{defect.frames} of {n_frames} frames count 0"


def _name(pair: Pair) -> str:
    return f"{pair.video.id}/{pair.expression.id}"


def _score_files(corpus: Corpus, pair: Pair, root: Path) -> Scored:
    video, expression = pair
    assumed = first_size(root, video.id, expression.id, video.frames)
    truth = read_truth(corpus, video, expression, assumed)
    height, width = truth.masks_thw.shape[1:]
    size = (height, width)
    predicted = read_masks(root, video.id, expression.id, video.frames, size)
    # a frame that is not scored may lack a prediction
    listed = {_name(pair), *_scored_names(pair, truth)}
    predicted.missing = [m for m in predicted.missing if m in listed]
    cause = looks_inverted(*_usable_masks(truth, predicted))
    if cause:
        reason = "the complement of the masks fits the ground truth"
        predicted.unexpected.append(Unexpected(place=_name(pair), reason=reason, cause=cause))
    row = _row(corpus, pair, truth, predicted)
    trace, fault = read_trace(root, video.id, expression.id, len(video.frames))
    if fault is not None:
        predicted.faults.append({"place": f"{_name(pair)}/trace.json", "reason": fault})
    if trace is not None:
        objects = None
        if (truth.scored & truth.known)[trace.keyframe]:
            objects = targets_at(corpus, video, expression, trace.keyframe, size)
        areas = np.where(truth.scored & truth.known, truth.masks_thw.sum(axis=(1, 2)), -1)
        row |= keyframe_figures(trace, areas, objects) | {"segmenter": trace.segmenter}
    return Scored(row, predicted.missing, predicted.faults, predicted.unexpected, truth.defects)


def _score_predicted(corpus: Corpus, pair: Pair, predict: Predict) -> Scored:
    truth = read_truth(corpus, *pair)
    shape = truth.masks_thw.shape
    try:
        masks = np.asarray(predict(corpus, *pair))
    except CorpusFault:
        # no file has the size of this clip, so its ground truth is unusable in any case
        truth.known[:], masks = False, np.zeros(shape, dtype=bool)
    if masks.shape != shape:
        raise ValueError(f"{_name(pair)}: masks have shape {masks.shape}, expected {shape}")
    everywhere = np.ones(len(masks), dtype=bool)
    row = _row(corpus, pair, truth, Predicted(masks != 0, everywhere))
    return Scored(row, defects=truth.defects)


def _scored_names(pair: Pair, truth: Truth) -> Iterator[str]:
    frames = zip(pair.video.frames, truth.scored, strict=True)
    return (f"{_name(pair)}/{frame}" for frame, scored in frames if scored)


def _usable_masks(truth: Truth, predicted: Predicted) -> tuple[np.ndarray, np.ndarray]:
    at = truth.scored & truth.known & predicted.usable
    return predicted.masks_thw[at], truth.masks_thw[at]


def _row(corpus: Corpus, pair: Pair, truth: Truth, predicted: Predicted) -> dict[str, Any]:
    """Return the expression's row; J and F are fractions, which `aggregate` turns into percent."""
    video, expression = pair
    at = truth.scored
    present, known = predicted.usable[at], truth.known[at]
    usable = present & known
    jaccard, boundary = jf_video(truth.masks_thw[at], predicted.masks_thw[at])
    counts = usable.size and (corpus.dataset != "revos" or usable.all())
    return {
        "video": video.id,
        "expression_id": expression.id,
        "expression": expression.text,
        "subset": _subset(corpus, pair),
        "J": float(np.where(usable, jaccard, 0.0).mean()) if counts else 0.0,
        "F": float(np.where(usable, boundary, 0.0).mean()) if counts else 0.0,
        "n_frames": int(at.sum()),
        "n_unusable_frames": int((~present).sum()),
        "n_frames_without_truth": int((~known).sum()),
        "defective": bool(truth.defects),
        "unexpected": bool(predicted.unexpected),
        "empty": bool(present.all() and not predicted.masks_thw[at].any()),
        "found": bool(predicted.masks_thw[at].any()),
    }


def _subset(corpus: Corpus, pair: Pair) -> Subset:
    if corpus.dataset != "revos":
        by_targets: tuple[Subset, ...] = ("no_target", "single_target", "multi_target")
        return by_targets[min(len(pair.expression.object_ids), 2)]
    names: dict[int | None, Subset] = {0: "referring", 1: "reasoning", 2: "no_target"}
    if pair.expression.type_id not in names:
        key = f"videos.{pair.video.id}.expressions.{pair.expression.id}.type_id"
        raise InputError("must be 0, 1 or 2", file=corpus.expressions_file, key=key)
    return names[pair.expression.type_id]
