"""Keyframes with what was predicted on them: boxes, points and mask outline against the truth's.

The frame is an embedded JPEG, what is drawn on it vector graphics. Which predictions are shown is
fixed: evenly spaced from the best to the worst J&F of a benchmark, so that a page shows failures
as well. Traces and masks are read as foreign input: what cannot be used is said in its place.
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

_LARGEST = 640
"""Longest side of an embedded frame in pixels; larger ones are scaled down."""


class _Step(BaseModel):
    model_config = ConfigDict(extra="ignore")
    task: str = ""
    frame: int | None = None
    response: str = ""


class ShownTrace(BaseModel):
    """What is shown of a trace.json. Frames are 0-based, coordinates source pixels."""

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
    """Up to `most` drawn predictions of RUN/predictions/<benchmark>, as HTML figures.

    result: RUN/eval/<benchmark>.json, which names the corpus and holds each expression's J&F.
    """
    try:
        corpus = open_corpus(benchmark, str(result.get("root", "")), str(result.get("split", "")))
        corpus.videos()
    except InputError as error:
        return [missing(f"the corpus of {benchmark}, to draw its frames ({error})")]
    rows = [row for row in result.get("per_expression", []) if _is_row(row)]
    return [_shot(corpus, run / "predictions" / benchmark, row) for row in spread(rows, most)]


def spread(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """`most` of the rows, evenly spaced from the highest to the lowest J&F."""
    ranked = sorted(rows, key=lambda r: (-r["J&F"], r["video"], r["expression_id"]))
    if len(ranked) <= most:
        return list(ranked)
    places = np.linspace(0, len(ranked) - 1, most).round().astype(int)
    return [ranked[i] for i in places]


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
            raise ValueError("the ids lead out of the folder")
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
    drawing = draw(frame, truth, mask, trace.boxes_source, trace.points_source)
    absent = "" if truth.any() else "no target in this frame · "
    facts = (
        f"{absent}J&amp;F {row['J&F']:.1f} · keyframe {trace.keyframe + 1} of {len(video.frames)}"
        f"{_rounds(trace)} · masks by {text(trace.segmenter or 'unknown', 60)}"
    )
    return (
        f'<figure class="shot">{drawing}<figcaption>{text(expression.text, 400)}'
        f"<small>{text(name, 200)}</small><small>{facts}</small></figcaption>"
        f"{_said(trace)}</figure>"
    )


def _rounds(trace: ShownTrace) -> str:
    if trace.rounds is None:
        return ""
    moved = trace.initial_keyframe is not None and trace.initial_keyframe != trace.keyframe
    first = f", first choice {trace.initial_keyframe + 1}" if moved else ""  # type: ignore[operator]
    return f" ({trace.rounds} AKS rounds{first})"


def _said(trace: ShownTrace) -> str:
    parts = [f"<p><b>description</b></p><pre>{text(trace.description)}</pre>"]
    for step in trace.steps[:40]:
        shown = "" if step.frame is None else f", frame {step.frame + 1}"
        parts.append(f"<p><b>{text(step.task, 40)}</b>{shown}</p><pre>{text(step.response)}</pre>")
    if trace.faults:
        parts.append(f"<p>Faults: {text(', '.join(trace.faults), 1000)}</p>")
    return details(f"Trace, {len(trace.steps)} answers", "".join(parts))


def draw(
    frame: np.ndarray,
    truth: np.ndarray,
    mask: np.ndarray,
    boxes: Sequence[Sequence[float]],
    points: Sequence[Sequence[float]],
) -> str:
    """SVG of a frame (uint8 [H, W, 3] RGB) with both masks' outlines (bool [H, W]) and prompts.

    Boxes are half-open [x1, y1, x2, y2] and points [x, y], in pixels of the frame.
    """
    height, width = truth.shape
    inside = np.array([width, height, width, height], dtype=float)
    parts = [f'<image width="{width}" height="{height}" href="{_jpeg(frame)}"/>']
    outline = _outline(truth)
    parts.append(f'<path class="under" d="{outline}"/><path class="truth" d="{outline}"/>')
    parts.append(f'<path class="pred" d="{_outline(mask)}"/>')
    for box in boxes[:50]:
        x1, y1, x2, y2 = np.clip(np.array(box, dtype=float), 0, inside)
        if x2 > x1 and y2 > y1:
            parts.append(
                f'<rect class="box" x="{x1:.2f}" y="{y1:.2f}" '
                f'width="{x2 - x1:.2f}" height="{y2 - y1:.2f}"/>'
            )
    radius = max(width, height) / 90
    for point in points[:50]:
        x, y = np.clip(np.array(point, dtype=float), 0, inside[:2])
        parts.append(f'<circle class="point" cx="{x:.2f}" cy="{y:.2f}" r="{radius:.2f}"/>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _union(masks: Mapping[str, np.ndarray], size: tuple[int, ...]) -> np.ndarray:
    return np.any([np.zeros(size, dtype=bool), *masks.values()], axis=0)


def _read_mask(path: Path, size: tuple[int, ...]) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            if (image.height, image.width) != size or len(image.getbands()) != 1:
                raise ValueError(f"{path.name} is not a mask of {size[0]} x {size[1]}")
            return np.asarray(image) != 0
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _outline(mask: np.ndarray) -> str:
    """Path along the pixels' own edges, so that it is exact also on small frames."""
    import cv2

    # Pixels are doubled and shifted half a pixel: contours run through pixel centres.
    height, width = mask.shape
    double = cv2.resize(
        mask.astype(np.uint8), (2 * width, 2 * height), interpolation=cv2.INTER_NEAREST
    )
    contours, _ = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    paths = []
    for contour in contours:
        points = contour.reshape(-1, 2) / 2 + 0.25
        paths.append("M" + "L".join(f"{x:g} {y:g}" for x, y in points) + "Z")
    return "".join(paths)


def _jpeg(frame: np.ndarray) -> str:
    import cv2

    share = _LARGEST / max(frame.shape[:2])
    if share < 1:
        frame = cv2.resize(frame, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(
        ".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88]
    )
    if not done:
        raise ValueError("the frame could not be encoded")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
