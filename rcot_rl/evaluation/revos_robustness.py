"""ReVOS' robustness R and pixel accuracy A, as VISA's public script computes them and corrected.

R of a frame is 1 minus the predicted pixels outside the target divided by the pixels of the
foreground, which is the union of all objects of the video; at least 0. A is the share of pixels
whose prediction equals the ground truth. Both are means over the frames of an expression, in
percent and rounded as J and F are; the overall figure is the mean of the referring and the
reasoning mean.

`legacy` repeats the script's arithmetic (tools/eval_revos.py of VISA), which VRS-HQ and GLUS share,
for masks saved as 0 and 255. Its figures compare with published ones. The script does not convert
masks to 0 and 1, computes in uint8 and adds up the ground truth of the objects:

- A pixel outside the target counts 255 times in R, so R is 0 for most imperfect masks.
- A pixel inside the target never equals the ground truth in A, since 255 is not 1.
- Where two objects overlap, the ground truth is 2 and 1 - 2 wraps around to 255, so a correct pixel
  reduces R by 255 * 255 mod 256 = 1 pixel.

`corrected` uses binary masks, the union of the objects, and the same means. In both forms an
expression counts 0 if its J and F do, or if its video has no usable foreground (`corrected` A
excepted, which needs none). The script then also counts J and F as 0; here they keep their values.
An annotation that an expression lists twice is counted once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from data_pipelines.corpora import CorpusFault, Expression, Video
from data_pipelines.corpora.revos import Revos
from rcot_rl.evaluation.predictions import Predicted
from rcot_rl.evaluation.truth import Truth, TruthDefect
from rcot_rl.stats.benchmark_means import SUBSET_MEANS, rounded

Form = Literal["legacy", "corrected"]
FIGURES = ("R", "A")
_NO_FOREGROUND = "R and legacy A of the expression count 0"


def frame_scores(
    targets_hw: np.ndarray, predicted_hw: np.ndarray, foreground_hw: np.ndarray
) -> tuple[float, float]:
    """Return R and A of one frame as fractions, by the script's arithmetic in uint8.

    Args:
        targets_hw: Ground truth, uint8 [H, W].
        predicted_hw: Prediction, uint8 [H, W].
        foreground_hw: All objects of the video, uint8 [H, W].
    """
    outside = ((1 - targets_hw) * predicted_hw).sum()
    robustness = max(1 - outside / (foreground_hw.sum() + 1e-6), 0.0)
    return float(robustness), float(np.mean(targets_hw == predicted_hw))


def expression_robustness(
    corpus: Revos, video: Video, expression: Expression, truth: Truth, predicted: Predicted
) -> tuple[dict[Form, dict[str, float | None]], TruthDefect | None]:
    """Return R and A of an expression in both forms, in percent; R is None without the file.

    The second value is the defect of the video's foreground, if it is unusable.
    """
    usable = truth.known & predicted.usable
    if not usable.size or not usable.all():
        lost = None if corpus.foreground is None else 0.0
        return {form: {"R": lost, "A": 0.0} for form in get_args(Form)}, None
    scores: dict[Form, list[tuple[float, float]]] = {"legacy": [], "corrected": []}
    defect: CorpusFault | None = None
    for t in range(len(video.frames)):
        targets, mask = _summed_targets(corpus, video, expression, truth, t), predicted.masks_thw[t]
        foreground = np.zeros(mask.shape, dtype=np.uint8)
        if corpus.foreground is not None and defect is None:
            try:
                foreground = _foreground(corpus, video, t, mask.shape)
            except CorpusFault as fault:
                defect = fault
        binary = mask.astype(np.uint8)
        scores["legacy"].append(frame_scores(targets, 255 * binary, foreground))
        union, any_object = (a.astype(bool).astype(np.uint8) for a in (targets, foreground))
        scores["corrected"].append(frame_scores(union, binary, any_object))
    means: dict[Form, dict[str, float | None]] = {}
    for form, frames in scores.items():
        robustness, accuracy = (100 * float(m) for m in np.mean(frames, axis=0))
        means[form] = {"R": robustness, "A": accuracy}
    if corpus.foreground is None:
        means["legacy"]["R"] = means["corrected"]["R"] = None
    if defect is None:
        return means, None
    means["legacy"] = {"R": 0.0, "A": 0.0}
    means["corrected"]["R"] = 0.0
    return means, _truth_defect(corpus, defect)


def robustness_summary(
    foreground_file: Path, rows: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any] | str | None]:
    """Return R and A over all expressions and per subset.

    Args:
        foreground_file: mask_dict_foreground.json of the corpus.
        rows: One dictionary per expression with "subset" and "robustness".

    Returns:
        Figures in percent; None for a mean without values:

            legacy, corrected   {R, A, per_subset: {subset: {R, A}}}
            reason              why R is None; None if it is known
    """
    missing = "no such file; R needs the masks of all objects of a video"
    reason = None if foreground_file.is_file() else f"{foreground_file}: {missing}"
    return {**{form: _form_summary(form, rows) for form in get_args(Form)}, "reason": reason}


def _form_summary(form: Form, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    subsets: dict[str, dict[str, float | None]] = {}
    for name in sorted({row["subset"] for row in rows}):
        members = [row["robustness"][form] for row in rows if row["subset"] == name]
        subsets[name] = {key: _mean(rounded("revos", _known(members, key))) for key in FIGURES}
    parts = [subsets[name] for name in SUBSET_MEANS["revos"] if name in subsets]
    overall = {key: _mean(_known(parts, key)) for key in FIGURES}
    return {**overall, "per_subset": subsets}


def _known(parts: Sequence[Mapping[str, float | None]], key: str) -> list[float]:
    return [value for part in parts if (value := part[key]) is not None]


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _summed_targets(
    corpus: Revos, video: Video, expression: Expression, truth: Truth, t: int
) -> np.ndarray:
    """Return the number of targets on each pixel of a frame, uint8 [H, W]."""
    if len(expression.anno_ids) < 2:
        return truth.masks_thw[t].astype(np.uint8)
    masks = (corpus.published_mask(video, anno_id, t) for anno_id in expression.anno_ids)
    present = [mask for mask in masks if mask is not None]
    empty = np.zeros_like(truth.masks_thw[t])
    return np.stack([empty, *present]).sum(axis=0, dtype=np.uint8)


def _foreground(corpus: Revos, video: Video, t: int, shape: tuple[int, ...]) -> np.ndarray:
    foreground = corpus.foreground_mask(video, t)
    if foreground.shape != shape:
        place = f"{corpus.foreground_file} {video.id}[{t}]"
        raise CorpusFault("mask_size", place, f"{foreground.shape}, the target's masks {shape}")
    return foreground


def _truth_defect(corpus: Revos, fault: CorpusFault) -> TruthDefect:
    file = str(corpus.foreground_file)
    reason = f"{fault.reason}: {fault.detail}"
    return TruthDefect(file, fault.place.removeprefix(f"{file} "), reason, effect=_NO_FOREGROUND)
