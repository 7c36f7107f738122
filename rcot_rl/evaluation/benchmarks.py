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

Beside these figures, the result has those of public scripts that count differently:
`revos_robustness` for ReVOS, `ref_davis` for DAVIS17, `reasonvos_script` for ReasonVOS.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from data_pipelines.corpora import Corpus, CorpusFault, Expression, Video, open_corpus
from data_pipelines.corpora.davis17 import Davis17
from data_pipelines.corpora.json_node import repeated_keys
from data_pipelines.corpora.revos import Revos
from data_pipelines.parallel import ordered_map
from rcot_rl.errors import InputError
from rcot_rl.evaluation.aggregate import Subset, aggregate
from rcot_rl.evaluation.jf import jf_video
from rcot_rl.evaluation.keyframe_figures import keyframe_figures
from rcot_rl.evaluation.mask_baselines import BASELINES
from rcot_rl.evaluation.predictions import (
    Predicted,
    files_digest,
    first_size,
    read_masks,
    read_trace,
)
from rcot_rl.evaluation.reasonvos_script import public_script_figures
from rcot_rl.evaluation.ref_davis import not_scored, official_figures
from rcot_rl.evaluation.revos_robustness import expression_robustness, robustness_summary
from rcot_rl.evaluation.score_statistics import score_differences
from rcot_rl.evaluation.truth import Truth, TruthDefect, clip_size, read_truth, targets_at
from rcot_rl.evaluation.unexpected import Unexpected, looks_inverted, unknown_folders
from rcot_rl.prediction_layout import expression_folder
from rcot_rl.system.machine import cpus
from rcot_rl.system.paths import check_path

__all__ = [
    "BASELINES",
    "Predict",
    "Progress",
    "benchmark_document",
    "evaluate",
    "evaluate_all",
    "evaluate_masks",
]

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
    workers: int | None = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score PREDICTIONS_DIR/<video>/<expression_id>/<frame>.png against a corpus.

    Args:
        limit: Score only the first expressions in the corpus' order.
        workers: Processes; None: all CPUs. Scores do not depend on it.

    Returns:
        JSON values: those of `aggregate.aggregate`, and

            benchmark, root, split, limit   what was scored; root is the corpus' folder
            missing      `video/expression` or `video/expression/frame` without a prediction
            faults       [{"place", "reason"}] predictions and traces that cannot be used
            unexpected   [{"place", "reason", "cause"}] unknown names and improper values
            defects      [{"file", "key", "reason", "effect", "expressions"}] of the ground truth
            predictions_dir
            robustness      ReVOS only: see `revos_robustness.robustness_summary`
            official        DAVIS17 only: see `ref_davis.official_figures`
            public_script   ReasonVOS only: see `reasonvos_script.public_script_figures`

    Raises:
        InputError: The folder is missing, the limit or the number of workers is below 1, or the
            corpus is unknown, unreadable or published without masks.
    """
    methods = {"": Path(predictions_dir)}
    results = evaluate_all(
        dataset, corpus_root, split, methods, limit, workers=workers, progress=progress
    )
    return results[""]


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
    return evaluate_all(dataset, corpus_root, split, {"": predict}, limit)[""]


def evaluate_all(
    dataset: str,
    corpus_root: Path,
    split: str,
    methods: Mapping[str, Path | Predict],
    limit: int | None = None,
    *,
    workers: int | None = 1,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Score several methods in one pass, so that the ground truth is decoded once for all.

    A worker holds the masks of one expression at a time: its ground truth and the masks of one
    method, H · W bytes per frame each. DAVIS17's official figures are a second pass for each
    method, in which a worker holds the label images and merged masks of one video.

    Args:
        methods: Name -> a folder of predictions or a function.

    Returns:
        Name -> the result of `evaluate`; `predictions_dir` only for folders.

    Raises:
        ValueError: See `evaluate_masks`.
        InputError: See `evaluate`.
    """
    corpus = open_corpus(dataset, corpus_root, split)
    for place in methods.values():
        if isinstance(place, Path):
            check_path(place)
            if not place.is_dir():
                raise InputError("predictions: no such folder", file=place)
    pairs = _pairs(corpus, limit)
    for pair in pairs:
        _subset(corpus, pair)
        expression_folder(corpus.root, pair.video.id, pair.expression.id, allow_hidden=True)
    if workers is None:
        workers = min(cpus(), len(pairs))
    if workers < 1:
        raise InputError(f"must be at least 1, not {workers}", key="workers")
    corpus.load()
    if isinstance(corpus, Revos):
        _ = corpus.foreground  # indexed once, before processes are forked
    message = "evaluation: %s '%s' at %s, %d expressions, %d methods, %d processes"
    logger.info(message, dataset, split, corpus.root, len(pairs), len(methods), workers)

    def score(index: int) -> list[Scored]:
        return _score(corpus, pairs[index], list(methods.values()))

    # forked processes do not survive OpenCV's threads
    cv2.setNumThreads(1)
    scored: list[list[Scored]] = []
    for row in ordered_map(score, range(len(pairs)), workers, chunk=1):
        scored.append(row)
        if progress is not None:
            progress(len(scored), len(pairs))
    columns = zip(methods.items(), zip(*scored, strict=True), strict=True)
    return {
        name: _result(corpus, pairs, limit, column, method, workers)
        for (name, method), column in columns
    }


def benchmark_document(
    checkpoints: Mapping[str, dict[str, Any]], baselines: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the content of RUN/eval/<benchmark>.json.

    Args:
        checkpoints: Name -> result, in order of training.
        baselines: Name -> result.

    Returns:
        The last checkpoint's result, `checkpoints`, `baselines`, and `differences`: those of every
        two checkpoints, and of the last one over each baseline (`score_differences`).
    """
    last = list(checkpoints)[-1]
    pairs = [*itertools.combinations(checkpoints, 2), *((name, last) for name in baselines)]
    results = {**baselines, **checkpoints}
    return checkpoints[last] | {
        "checkpoints": dict(checkpoints),
        "baselines": dict(baselines),
        "differences": score_differences(checkpoints[last]["benchmark"], results, pairs),
    }


def _pairs(corpus: Corpus, limit: int | None) -> list[Pair]:
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
    return pairs


def _result(
    corpus: Corpus,
    pairs: Sequence[Pair],
    limit: int | None,
    scored: Sequence[Scored],
    method: Path | Predict,
    workers: int,
) -> dict[str, Any]:
    """Return the result of one method."""
    rows = [s.row for s in scored]
    result = {
        "benchmark": corpus.dataset,
        "root": str(corpus.root),
        "split": corpus.split,
        "limit": limit,
        **aggregate(corpus.dataset, rows),
        **_public_figures(corpus, pairs, rows, method, workers),
        "missing": [m for s in scored for m in s.missing],
        "faults": [f for s in scored for f in s.faults],
        "unexpected": [u for s in scored for u in s.unexpected],
        "defects": [*_repeated(corpus), *_listed(corpus, pairs, scored)],
    }
    if isinstance(method, Path):
        places = [(v.id, e.id) for v in corpus.videos() for e in v.expressions]
        result["unexpected"] = [*unknown_folders(method, places), *result["unexpected"]]
        result["predictions_dir"] = str(method)
    return result


def _public_figures(
    corpus: Corpus,
    pairs: Sequence[Pair],
    rows: Sequence[dict[str, Any]],
    method: Path | Predict,
    workers: int,
) -> dict[str, Any]:
    """Return one method's figures of public scripts that count differently.

    Args:
        rows: One for each pair.
    """
    if isinstance(corpus, Revos):
        return {"robustness": robustness_summary(corpus.foreground_file, rows)}
    if isinstance(corpus, Davis17):
        if len(pairs) < sum(len(video.expressions) for video in corpus.videos()):
            return {"official": not_scored("only some of the expressions were scored (limit)")}
        return {"official": official_figures(corpus, partial(_read, corpus, method), workers)}
    if corpus.dataset == "reasonvos":
        expressions = [pair.expression for pair in pairs]
        return {"public_script": public_script_figures(expressions, rows)}
    return {}


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
    if defect.effect:
        return defect.effect
    if n_frames and not defect.frames:
        return "does not change the score"
    if corpus.dataset == "revos" or defect.frames == n_frames:
        return "the expression counts 0"
    return f"{defect.frames} of {n_frames} frames count 0"


def _name(pair: Pair) -> str:
    return f"{pair.video.id}/{pair.expression.id}"


def _score(corpus: Corpus, pair: Pair, methods: Sequence[Path | Predict]) -> list[Scored]:
    """Score one expression of all methods against its ground truth, which is read once.

    Methods often predict the same masks: variants with the same keyframe, for example. These are
    decoded and scored once.
    """
    size = clip_size(corpus, *pair)
    # without a mask or a JPEG, the size of the predictions is assumed
    sizes = [size or _assumed_size(method, pair) for method in methods]
    truths = {one: read_truth(corpus, *pair, one) for one in dict.fromkeys(sizes)}
    known: dict[tuple[tuple[int, int], bytes], Scored] = {}
    return [
        _score_files(corpus, pair, truths[one], method, known)
        if isinstance(method, Path)
        else _score_predicted(corpus, pair, truths[one], method)
        for method, one in zip(methods, sizes, strict=True)
    ]


def _assumed_size(method: Path | Predict, pair: Pair) -> tuple[int, int]:
    video, expression = pair
    if isinstance(method, Path):
        size = first_size(method, video.id, expression.id, video.frames)
        if size is not None:
            return size
    return 1, 1


def _score_files(
    corpus: Corpus,
    pair: Pair,
    truth: Truth,
    root: Path,
    known: dict[tuple[tuple[int, int], bytes], Scored],
) -> Scored:
    """Score a folder's masks and trace.

    Args:
        known: Size and files of masks -> their result; gets that of these masks.
    """
    video, expression = pair
    height, width = truth.masks_thw.shape[1:]
    size = (height, width)
    digest = files_digest(root, video.id, expression.id, video.frames)
    scored = None if digest is None else known.get((size, digest))
    if scored is None:
        scored = _score_masks(corpus, pair, truth, root)
        if digest is not None:
            known[size, digest] = scored
    # the trace adds to the row and the faults
    scored = replace(scored, row={**scored.row}, faults=[*scored.faults])
    trace, fault = read_trace(root, video.id, expression.id, len(video.frames))
    if fault is not None:
        scored.faults.append({"place": f"{_name(pair)}/trace.json", "reason": fault})
        scored.row["trace_fault"] = fault
    if trace is not None:
        objects = None
        if (truth.scored & truth.known)[trace.keyframe]:
            objects = targets_at(corpus, video, expression, trace.keyframe, size)
        areas = np.where(truth.scored & truth.known, truth.areas, -1)
        scored.row |= keyframe_figures(trace, areas, objects) | {"segmenter": trace.segmenter}
    return scored


def _score_masks(corpus: Corpus, pair: Pair, truth: Truth, root: Path) -> Scored:
    video, expression = pair
    height, width = truth.masks_thw.shape[1:]
    predicted = _read(corpus, root, video, expression, (height, width))
    # a frame that is not scored may lack a prediction
    listed = {_name(pair), *_scored_names(pair, truth)}
    predicted.missing = [m for m in predicted.missing if m in listed]
    cause = looks_inverted(*_usable_masks(truth, predicted))
    if cause:
        reason = "the complement of the masks fits the ground truth"
        predicted.unexpected.append(Unexpected(place=_name(pair), reason=reason, cause=cause))
    return _scored(corpus, pair, truth, predicted)


def _score_predicted(corpus: Corpus, pair: Pair, truth: Truth, predict: Predict) -> Scored:
    length, height, width = truth.masks_thw.shape
    try:
        predicted = _read(corpus, predict, *pair, (height, width))
    except CorpusFault:
        # no file has the size of this clip, so its ground truth is unusable in any case
        truth = replace(truth, known=np.zeros_like(truth.known))
        masks = np.zeros(truth.masks_thw.shape, dtype=bool)
        predicted = Predicted(masks, np.ones(length, dtype=bool))
    return _scored(corpus, pair, truth, predicted)


def _read(
    corpus: Corpus,
    method: Path | Predict,
    video: Video,
    expression: Expression,
    size: tuple[int, int],
) -> Predicted:
    """Return a method's masks of an expression at size (H, W).

    Raises:
        CorpusFault: A function could not read the corpus.
        ValueError: A function returned masks of another shape.
    """
    if isinstance(method, Path):
        return read_masks(method, video.id, expression.id, video.frames, size)
    masks = np.asarray(method(corpus, video, expression))
    shape = (len(video.frames), *size)
    if masks.shape != shape:
        name = _name(Pair(video, expression))
        raise ValueError(f"{name}: masks have shape {masks.shape}, expected {shape}")
    return Predicted(masks != 0, np.ones(len(masks), dtype=bool))


def _scored_names(pair: Pair, truth: Truth) -> Iterator[str]:
    frames = zip(pair.video.frames, truth.scored, strict=True)
    return (f"{_name(pair)}/{frame}" for frame, scored in frames if scored)


def _usable_masks(truth: Truth, predicted: Predicted) -> tuple[np.ndarray, np.ndarray]:
    at = truth.scored & truth.known & predicted.usable
    return _frames_at(predicted.masks_thw, at), _frames_at(truth.masks_thw, at)


def _frames_at(masks_thw: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the frames where `at` is True, without a copy if it is True everywhere."""
    return masks_thw if at.all() else masks_thw[at]


def _scored(corpus: Corpus, pair: Pair, truth: Truth, predicted: Predicted) -> Scored:
    """Score an expression; J and F are fractions, which `aggregate` turns into percent."""
    video, expression = pair
    at = truth.scored
    present, known = predicted.usable[at], truth.known[at]
    usable = present & known
    masks = _frames_at(predicted.masks_thw, at)
    jaccard, boundary = jf_video(_frames_at(truth.masks_thw, at), masks)
    counts = usable.size and (corpus.dataset != "revos" or usable.all())
    # methods share the ground truth, so its list of defects is copied
    defects, extra = [*truth.defects], {}
    if isinstance(corpus, Revos):
        extra["robustness"], defect = expression_robustness(corpus, *pair, truth, predicted)
        if defect is not None:
            defects.append(defect)
    row = {
        "video": video.id,
        "expression_id": expression.id,
        "expression": expression.text,
        "subset": _subset(corpus, pair),
        "J": float(np.where(usable, jaccard, 0.0).mean()) if counts else 0.0,
        "F": float(np.where(usable, boundary, 0.0).mean()) if counts else 0.0,
        "n_frames": int(at.sum()),
        "n_unusable_frames": int((~present).sum()),
        "n_frames_without_truth": int((~known).sum()),
        "defective": bool(defects),
        "unexpected": bool(predicted.unexpected),
        "empty": bool(present.all() and not masks.any()),
        "found": bool(masks.any()),
        **extra,
    }
    return Scored(row, predicted.missing, predicted.faults, predicted.unexpected, defects)


def _subset(corpus: Corpus, pair: Pair) -> Subset:
    if corpus.dataset != "revos":
        by_targets: tuple[Subset, ...] = ("no_target", "single_target", "multi_target")
        return by_targets[min(len(pair.expression.object_ids), 2)]
    names: dict[int | None, Subset] = {0: "referring", 1: "reasoning", 2: "no_target"}
    if pair.expression.type_id not in names:
        key = f"videos.{pair.video.id}.expressions.{pair.expression.id}.type_id"
        raise InputError("must be 0, 1 or 2", file=corpus.expressions_file, key=key)
    return names[pair.expression.type_id]
