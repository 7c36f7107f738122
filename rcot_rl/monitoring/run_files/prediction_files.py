"""Read predictions of a run: the trace of an expression, and its masks.

Traces and masks may come from anywhere; what is invalid raises an error that names the reason.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from data_pipelines.corpora import Corpus, Expression, Video
from rcot_rl.prediction_layout import TRACE_FILE, mask_file
from rcot_rl.protocol.parser import parse_option, parse_response


class ShownStep(BaseModel):
    """The shown part of one response of a trace."""

    model_config = ConfigDict(extra="ignore")
    task: str = ""
    frame: int | None = None
    response: str = ""
    option_probabilities: dict[str, FiniteFloat] | None = None

    @property
    def option(self) -> str | None:
        """`A` or `B`; None if the response has neither."""
        return parse_option(parse_response(self.response).answer)


class ShownTrace(BaseModel):
    """The shown part of a trace.json; frames are 0-based, coordinates are source pixels."""

    model_config = ConfigDict(extra="ignore")
    keyframe: int = Field(ge=0)
    initial_keyframe: int | None = None
    rounds: int | None = None
    description: str = ""
    boxes_source: list[tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]] = []
    points_source: list[tuple[FiniteFloat, FiniteFloat]] = []
    segmenter: str | None = None
    steps: list[ShownStep] = []
    faults: list[str] = []

    @property
    def judgements(self) -> list[ShownStep]:
        """The AKS judgements that name their frame, in order."""
        return [step for step in self.steps if step.task == "aks" and step.frame is not None]


def read_trace(folder: Path, n_frames: int) -> ShownTrace:
    """Return the trace of an expression's folder. Raises OSError or ValueError.

    Args:
        n_frames: Frames of the video; the keyframe must be one of them.
    """
    try:
        trace = ShownTrace.model_validate(json.loads((folder / TRACE_FILE).read_bytes()))
    except RecursionError:
        raise ValueError(f"{TRACE_FILE} is nested too deeply") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "top level"
        raise ValueError(f"{TRACE_FILE}: {place}: {first['msg']}") from error
    if trace.keyframe >= n_frames:
        raise ValueError(f"keyframe {trace.keyframe} of {n_frames} frames")
    return trace


def true_mask(
    corpus: Corpus, video: Video, expression: Expression, index: int, size: tuple[int, int]
) -> np.ndarray:
    """Return the union of an expression's masks in a frame as bool [H, W], `size`."""
    masks = corpus.masks(video, expression, index)
    return np.any([np.zeros(size, dtype=bool), *masks.values()], axis=0)


def read_mask(folder: Path, frame: str, size: tuple[int, int]) -> np.ndarray:
    """Return a predicted mask as bool [H, W], `size`. Raises OSError or ValueError."""
    from PIL import Image

    path = mask_file(folder, frame)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if (image.height, image.width) != size or len(image.getbands()) != 1:
                raise ValueError(f"{path.name} is no mask of {size[0]} x {size[1]} pixels")
            return np.asarray(image) != 0
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name}: {error}") from error
