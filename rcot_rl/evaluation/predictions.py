"""Predicted masks and the traces beside them, read from a folder that nobody vouches for.

    DIR/<video>/<expression_id>/<frame>.png      single channel, any non-zero pixel is foreground
    DIR/<video>/<expression_id>/trace.json       where the pipeline looked and what it boxed

What is missing or broken is said, never raised: a run's predictions are scored whatever they hold.
Only an id of the corpus that cannot name a folder is an InputError.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from rcot_rl.errors import InputError

TRACE = "trace.json"
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_MODES = ("1", "L", "P", "I;16", "I")
_Box = Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]


class KeyframeTrace(BaseModel):
    """What the evaluation needs of a trace.json; other keys are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    keyframe: int = Field(ge=0)
    """0-based index into the video's frames."""

    initial_keyframe: int = Field(ge=0)
    rounds: int = Field(ge=0)
    """Judgements that AKS made."""

    boxes_source: list[_Box]
    """Predicted boxes on the keyframe, [x1, y1, x2, y2] half-open in source pixels."""

    segmenter: str
    """What made the masks."""


@dataclass
class Predicted:
    """The masks of one expression and what was wrong with them."""

    masks_thw: np.ndarray
    """bool [T, H, W]; a frame that is not usable is all False."""

    usable: np.ndarray
    """bool [T]"""

    missing: list[str] = field(default_factory=list)
    """`video/expression`, or `video/expression/frame` where only frames are missing."""

    faults: list[dict[str, str]] = field(default_factory=list)
    """{"place", "reason"}"""


def expression_folder(root: Path, video: str, expression: str) -> Path:
    """ROOT/<video>/<expression>, which lies below ROOT whatever the ids are, or InputError."""
    for name in (video, expression):
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
            raise InputError("this id cannot name a folder of predictions", key=name)
    return root / video / expression


def read_masks(
    root: Path, video: str, expression: str, frames: Sequence[str], size: tuple[int, int]
) -> Predicted:
    """The masks of `frames` (stems), which should be of `size` (H, W)."""
    folder = expression_folder(root, video, expression)
    name = f"{video}/{expression}"
    found = Predicted(np.zeros((len(frames), *size), dtype=bool), np.zeros(len(frames), dtype=bool))
    for t, frame in enumerate(frames):
        path = folder / f"{frame}.png"
        if not path.is_file():
            found.missing.append(f"{name}/{frame}")
            continue
        mask = _read_png(path, size)
        if isinstance(mask, str):
            found.faults.append({"place": f"{name}/{frame}.png", "reason": mask})
            continue
        found.masks_thw[t], found.usable[t] = mask, True
    if len(found.missing) == len(frames):
        found.missing = [name]
    return found


def _read_png(path: Path, size: tuple[int, int]) -> np.ndarray | str:
    """bool [H, W], or the reason why not. The header is checked before pixels are decoded."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if (image.height, image.width) != size:
                return f"is {image.height} x {image.width}, not {size[0]} x {size[1]}"
            if image.mode not in _MODES:
                return f"has mode {image.mode}, not a single channel"
            return np.asarray(image) != 0
    except (*_BROKEN, Image.DecompressionBombError) as error:
        return f"cannot be read ({type(error).__name__})"


def read_trace(
    root: Path, video: str, expression: str, n_frames: int
) -> tuple[KeyframeTrace | None, str | None]:
    """The trace, if there is one, and what is wrong with it, if anything."""
    path = expression_folder(root, video, expression) / TRACE
    if not path.is_file():
        return None, None
    try:
        # Python's reader, since a model's answer may hold halves of surrogate pairs.
        trace = KeyframeTrace.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        return None, ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")
    except (OSError, ValueError, RecursionError) as error:
        return None, f"cannot be read ({type(error).__name__})"
    if max(trace.keyframe, trace.initial_keyframe) >= n_frames:
        return None, f"a keyframe beyond the video's {n_frames} frames"
    return trace, None
