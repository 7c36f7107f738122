"""J, F and J&F of a folder of predictions on a benchmark, by its public protocol.

| benchmark       | protocol                                                                       |
| --------------- | ------------------------------------------------------------------------------ |
| ref-youtube-vos | mean over all annotated frames, then over expressions                          |
| mevis           | the same                                                                       |
| reasonvos       | the same; the annotated frames are those that have a PNG                       |
| davis17         | the same, each expression alone (VISA's protocol, which the paper follows)     |
| revos           | J and F of an expression in percent rounded to 2 decimals; means over the      |
|                 | referring and over the reasoning ones; overall is the mean of the two means    |

J&F is the mean of J and F, all in percent. Every expression stays in the mean:

- A missing or unusable prediction of a frame counts 0 and is listed. In ReVOS it makes the whole
  expression count 0, as in the public script; the other scripts skip such expressions or crash.
- Ground truth is read as the public scripts read it: a mask list with more entries than frames is
  scored, and JPEGs are not needed. A frame whose ground truth is missing or unusable counts 0; in
  ReVOS the whole expression does, as in the public script. Each such defect is listed.
- Any pixel that is not 0 counts as object, as in the public scripts. Other values than 0 and 255,
  and names that no frame or expression has, are listed with their likely cause.

ReVOS' expressions without a target (type 2) are in no mean of J or F; like those of any benchmark
they are reported apart, with N-Acc (how many are left empty in every frame) beside T-Acc (how many
of those with a target are not).

Left out: DAVIS' own route over four merged annotators, and ReVOS' accuracy and robustness scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.corpora import Corpus, CorpusFault, Expression, Video, open_corpus
from data_pipelines.corpora.metadata import repeated_keys
from data_pipelines.parallel import ordered_map
from rcot_rl.errors import InputError
from rcot_rl.evaluation.baselines import BASELINES
from rcot_rl.evaluation.jf import jf_video
from rcot_rl.evaluation.keyframes import keyframe_figures
from rcot_rl.evaluation.predictions import Predicted, first_size, read_masks, read_trace
from rcot_rl.evaluation.summary import summarise
from rcot_rl.evaluation.truth import Defect, Truth, read_truth, targets_at
from rcot_rl.evaluation.unexpected import Unexpected, looks_inverted, unknown_folders
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
class Scored:
    """One expression's line of the result, and what is to be listed."""

    row: dict[str, Any]
    missing: list[str] = field(default_factory=list)
    faults: list[dict[str, str]] = field(default_factory=list)
    unexpected: list[Unexpected] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)


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
        unexpected   [{"place", "reason", "cause"}] names and values no prediction should have
        defects      [{"file", "key", "reason", "effect", "expressions"}] of the ground truth

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
    places = [(v.id, e.id) for v in corpus.videos() for e in v.expressions]
    unexpected = [*unknown_folders(root, places), *result["unexpected"]]
    return {**result, "unexpected": unexpected, "predictions_dir": str(root)}


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
        **summarise(corpus.dataset, [s.row for s in scored]),
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
    """Each defect once, with what it costs and the expressions that it touches."""
    expressions: dict[tuple[Defect, str], list[str]] = {}
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


def _effect(corpus: Corpus, defect: Defect, n_frames: int) -> str:
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
    # A frame without ground truth may be missing.
    listed = {_name(pair), *_scored_names(pair, truth)}
    predicted.missing = [m for m in predicted.missing if m in listed]
    cause = looks_inverted(*_usable_masks(truth, predicted))
    if cause:
        reason = "the complement of the masks fits the ground truth"
        predicted.unexpected.append(Unexpected(place=_name(pair), reason=reason, cause=cause))
    row = _row(corpus, pair, truth, predicted)
    trace, wrong = read_trace(root, video.id, expression.id, len(video.frames))
    if wrong is not None:
        predicted.faults.append({"place": f"{_name(pair)}/trace.json", "reason": wrong})
    if trace is not None:
        objects = None
        if (truth.scored & truth.known)[trace.keyframe]:
            objects = targets_at(corpus, video, expression, trace.keyframe, size)
        areas = np.where(truth.scored & truth.known, truth.masks_thw.sum(axis=(1, 2)), -1)
        row |= keyframe_figures(trace, areas, objects) | {"segmenter": trace.segmenter}
    return Scored(row, predicted.missing, predicted.faults, predicted.unexpected, truth.defects)


def _score_made(corpus: Corpus, pair: Pair, predict: Predict) -> Scored:
    truth = read_truth(corpus, *pair)
    wanted = truth.masks_thw.shape
    try:
        masks = np.asarray(predict(corpus, *pair))
    except CorpusFault:
        # no file tells the size of this clip: its ground truth is unusable in any case
        truth.known[:], masks = False, np.zeros(wanted, dtype=bool)
    if masks.shape != wanted:
        raise ValueError(f"{_name(pair)}: {masks.shape}, not {wanted}")
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
    """The expression's line; J and F are fractions here, `summarise` makes percent of them."""
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


def _subset(corpus: Corpus, pair: Pair) -> str:
    if corpus.dataset != "revos":
        targets = len(pair.expression.object_ids)
        return ("no_target", "single_target", "multi_target")[min(targets, 2)]
    names = {0: "referring", 1: "reasoning", 2: "no_target"}
    if pair.expression.type_id not in names:
        key = f"videos.{pair.video.id}.expressions.{pair.expression.id}.type_id"
        raise InputError("must be 0, 1 or 2", file=corpus.expressions_file, key=key)
    return names[pair.expression.type_id]
