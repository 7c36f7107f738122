"""Keyframes with the predicted boxes, points and mask outline, and the true outline.

The shown predictions are evenly spaced from the best to the worst J&F of a benchmark, so that the
page shows failures too. Traces and masks may come from anywhere: a prediction that cannot be drawn
is replaced by the reason.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from data_pipelines.corpora import Corpus, CorpusFault, open_corpus
from rcot_rl.errors import InputError
from rcot_rl.monitoring.page import details, missing, text
from rcot_rl.monitoring.svg_overlay import Overlay
from rcot_rl.prediction_layout import benchmark_predictions

_LARGEST = 640
"""Longest side of an embedded frame in pixels; larger frames are scaled down."""


class _Step(BaseModel):
    model_config = ConfigDict(extra="ignore")
    task: str = ""
    frame: int | None = None
    response: str = ""


class ShownTrace(BaseModel):
    """The shown part of a trace.json; frames are 0-based, coordinates are source pixels."""

    model_config = ConfigDict(extra="ignore")
    keyframe: int
    initial_keyframe: int | None = None
    rounds: int | None = None
    description: str = ""
    boxes_source: list[tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]] = []
    points_source: list[tuple[FiniteFloat, FiniteFloat]] = []
    segmenter: str | None = None
    steps: list[_Step] = []
    faults: list[str] = []


def shots(run: Path, benchmark: str, result: Mapping[str, Any], most: int) -> list[str]:
    """Return up to `most` predictions of RUN/predictions/<benchmark> as HTML figures.

    Args:
        benchmark: `<dataset>-<split>`; runs of older versions have only the dataset.
        result: RUN/eval/<benchmark>.json, with the corpus and the J&F of each expression.
    """
    dataset, root, split = (str(result.get(key, "")) for key in ("benchmark", "root", "split"))
    try:
        corpus = open_corpus(dataset, root, split)
        corpus.videos()
    except InputError as error:
        return [missing(f"the corpus of {benchmark}, for its frames ({error})")]
    rows = [row for row in result.get("per_expression", []) if _is_row(row)]
    return [_shot(corpus, benchmark_predictions(run, benchmark), row) for row in spread(rows, most)]


def spread(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Return `most` of the rows, evenly spaced from the highest to the lowest J&F."""
    ranked = sorted(rows, key=lambda r: (-r["J&F"], r["video"], r["expression_id"]))
    if len(ranked) <= most:
        return list(ranked)
    ranks = np.linspace(0, len(ranked) - 1, most).round().astype(int)
    return [ranked[i] for i in ranks]


def _is_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("video"), str)
        and isinstance(row.get("expression_id"), str)
        and isinstance(row.get("J&F"), int | float)
    )


def _shot(corpus: Corpus, predictions: Path, row: Mapping[str, Any]) -> str:
    name = f"{row['video']} / {row['expression_id']}"
    folder = predictions / row["video"] / row["expression_id"]
    try:
        if not folder.resolve().is_relative_to(predictions.resolve()):
            raise ValueError("the ids point outside the folder")
        video = corpus.video(row["video"])
        expression = next(e for e in video.expressions if e.id == row["expression_id"])
        trace = ShownTrace.model_validate(json.loads((folder / "trace.json").read_bytes()))
        if not 0 <= trace.keyframe < len(video.frames):
            raise ValueError(f"keyframe {trace.keyframe} of {len(video.frames)} frames")
        frame = corpus.frame(video.id, video.frames[trace.keyframe])
        truth = _union(corpus.masks(video, expression, trace.keyframe), frame.shape[:2])
        mask = _read_mask(folder / f"{video.frames[trace.keyframe]}.png", frame.shape[:2])
    except (KeyError, StopIteration):
        return missing(f"{name}: not in the corpus")
    except (ValidationError, CorpusFault, OSError, ValueError, RecursionError) as error:
        return missing(f"{name}: cannot be drawn ({str(error).splitlines()[0]})")
    alt = f"Keyframe of {name}, with the outlines of the true and the predicted mask"
    drawing = draw(frame, truth, mask, trace.boxes_source, trace.points_source, alt)
    no_target = "" if truth.any() else "no target in this frame · "
    facts = (
        f"{no_target}J&amp;F {row['J&F']:.1f} · "
        f"keyframe {trace.keyframe + 1} of {len(video.frames)}{_rounds(trace)} · "
        f"masks by {text(trace.segmenter or 'unknown', 60)}"
    )
    return (
        f'<figure class="shot">{drawing}<figcaption>{text(expression.text, 400)}'
        f"<small>{text(name, 200)}</small><small>{facts}</small></figcaption>"
        f"{_steps(trace)}</figure>"
    )


def _rounds(trace: ShownTrace) -> str:
    if trace.rounds is None:
        return ""
    first = ""
    if trace.initial_keyframe is not None and trace.initial_keyframe != trace.keyframe:
        first = f", first choice {trace.initial_keyframe + 1}"
    return f" ({trace.rounds} AKS rounds{first})"


def _steps(trace: ShownTrace) -> str:
    parts = [f"<p><b>description</b></p><pre>{text(trace.description)}</pre>"]
    for step in trace.steps[:40]:
        frame = "" if step.frame is None else f", frame {step.frame + 1}"
        parts.append(f"<p><b>{text(step.task, 40)}</b>{frame}</p><pre>{text(step.response)}</pre>")
    if trace.faults:
        parts.append(f"<p>Faults: {text(', '.join(trace.faults), 1000)}</p>")
    return details(f"Trace, {len(trace.steps)} responses", "".join(parts))


def draw(
    frame: np.ndarray,
    truth: np.ndarray,
    mask: np.ndarray,
    boxes: Sequence[Sequence[float]],
    points: Sequence[Sequence[float]],
    alt: str,
) -> str:
    """Return HTML of a frame with the outlines of both masks and the predicted prompts.

    Args:
        frame: uint8 [H, W, 3] RGB.
        truth: bool [H, W].
        mask: bool [H, W], predicted.
        boxes: half-open [x1, y1, x2, y2] in pixels of the frame.
        points: [x, y] in pixels of the frame.
    """
    height, width = truth.shape
    overlay = Overlay(width, height)
    overlay.outline(truth, "black", width=3)
    overlay.outline(truth, "white", style="--")
    overlay.outline(mask, "#ff3d8b")
    overlay.boxes(boxes[:50], "#27e0ff")
    overlay.points(points[:50], "#ffe14a")
    return overlay.html(_jpeg(frame), alt)


def _union(masks: Mapping[str, np.ndarray], size: tuple[int, ...]) -> np.ndarray:
    """Return the union of the objects' masks: bool [H, W]."""
    return np.any([np.zeros(size, dtype=bool), *masks.values()], axis=0)


def _read_mask(path: Path, size: tuple[int, ...]) -> np.ndarray:
    """Return a mask PNG as bool [H, W], H and W of `size`."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            if (image.height, image.width) != size or len(image.getbands()) != 1:
                raise ValueError(f"{path.name} is no mask of {size[0]} x {size[1]} pixels")
            return np.asarray(image) != 0
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _jpeg(frame: np.ndarray) -> str:
    """Return a frame (uint8 [H, W, 3] RGB) as a data URI."""
    import cv2

    scale = _LARGEST / max(frame.shape[:2])
    if scale < 1:
        frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    encoded, data = cv2.imencode(
        ".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88]
    )
    if not encoded:
        raise ValueError("the frame could not be encoded")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
