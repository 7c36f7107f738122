"""Read predicted masks and their traces from an untrusted folder.

    DIR/<video>/<expression_id>/<frame>.png      single channel, 0 or 255
    DIR/<video>/<expression_id>/trace.json       the pipeline's keyframes and boxes

Every pixel that is not 0 is foreground, as in the public scripts. Like them, this module reads a
palette image by its colours and uses the upper 8 of 16 bits. Values other than 0 and 255 (or 0 and
1) are reported.

Missing and broken files are reported, not raised: predictions are always scored. Only a corpus id
that cannot name a folder raises InputError.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
)

from rcot_rl.evaluation.unexpected import Unexpected, unknown_files, value_cause
from rcot_rl.prediction_layout import TRACE_FILE, expression_folder, mask_file

BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
"""What decoding a damaged PNG raises."""

_MODES = ("1", "L", "P", "I;16", "I")
_Size = tuple[int, int]
_Box = Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
_Count = Annotated[int, Field(ge=0, le=10**12)]
_Seconds = Annotated[FiniteFloat, Field(ge=0, le=1e9)]
_Probability = Annotated[FiniteFloat, Field(ge=0, le=1.001)]  # rounding may exceed 1


class RecordedStep(BaseModel):
    """The part of a trace's step that the evaluation reads: one request and its response."""

    model_config = ConfigDict(strict=True, extra="ignore")

    task: Literal["vdg", "kfg", "aks", "kfg_again", "ktg"]
    frame: int | None = Field(default=None, ge=0)
    """The frame that was shown; None: frames of the video."""
    frames: list[int] | None = None
    """The frames of the video that were shown; None: all, or `frame`."""
    prompt: str = ""
    response: str = ""
    option_probabilities: dict[str, _Probability] | None = None
    prompt_tokens: _Count = 0
    cached_tokens: _Count = 0
    tokens: _Count = 0
    """Generated tokens."""
    seconds: _Seconds | None = None
    """None: not recorded."""


class KeyframeTrace(BaseModel):
    """The part of a trace.json that the evaluation reads; other keys are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    keyframe: int = Field(ge=0)
    """0-based index into the video's frames."""
    initial_keyframe: int = Field(ge=0)
    rounds: int = Field(ge=0)
    """Number of AKS judgements."""
    boxes_source: list[_Box]
    """Predicted boxes on the keyframe, [x1, y1, x2, y2] half-open in source pixels."""
    points_source: list[Any] = Field(default_factory=list)
    """Predicted points; only compared with those of other traces."""
    segmenter: str
    """Name of the segmenter."""
    segment_seconds: _Seconds | None = None
    """Seconds in which the segmenter made the masks; None: not recorded."""
    steps: list[RecordedStep] = Field(default_factory=list)
    """The requests to the model, in order."""

    @field_validator("steps", "points_source", mode="before")
    @classmethod
    def _other_lists(cls, value: Any) -> Any:
        """Ignore a key of the same name that is not a list: another program wrote it."""
        return value if isinstance(value, list) else []


@dataclass
class Predicted:
    """The masks of one expression and their faults."""

    masks_thw: np.ndarray
    """bool [T, H, W]; a frame that is not usable is all False."""
    usable: np.ndarray
    """bool [T]"""
    missing: list[str] = field(default_factory=list)
    """`video/expression`, or `video/expression/frame` where only frames are missing."""
    faults: list[dict[str, str]] = field(default_factory=list)
    """{"place", "reason"}"""
    unexpected: list[Unexpected] = field(default_factory=list)
    """Unknown names and improper values."""


class _Png(NamedTuple):
    """One decoded mask."""

    mask: np.ndarray
    """bool [H, W]"""
    values: frozenset[int]
    palette: bool
    caveat: str = ""
    """Why its pixels may not mean what they seem to."""


def first_size(root: Path, video: str, expression: str, frames: Sequence[str]) -> _Size | None:
    """Return (H, W) of the first mask of `frames` (stems) whose header is readable."""
    folder = expression_folder(root, video, expression, allow_hidden=True)
    for frame in frames:
        try:
            with Image.open(mask_file(folder, frame), formats=["PNG"]) as image:
                return image.height, image.width
        except (*BROKEN, Image.DecompressionBombError):
            continue
    return None


def files_digest(root: Path, video: str, expression: str, frames: Sequence[str]) -> bytes | None:
    """Return a digest of all that `read_masks` reads; None if a file cannot be read."""
    folder = expression_folder(root, video, expression, allow_hidden=True)
    digest = hashlib.blake2b(json.dumps(sorted(_file_names(folder))).encode(), digest_size=16)
    for frame in frames:
        path = mask_file(folder, frame)
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            digest.update(b"absent ")
        except OSError:
            return None
        else:
            digest.update(b"%d " % len(content) + content)
    return digest.digest()


def read_masks(
    root: Path, video: str, expression: str, frames: Sequence[str], size: _Size
) -> Predicted:
    """Read the masks of `frames` (stems); a mask of another size than (H, W) is a fault."""
    folder = expression_folder(root, video, expression, allow_hidden=True)
    name = f"{video}/{expression}"
    masks = np.zeros((len(frames), *size), dtype=bool)
    predicted = Predicted(masks, np.zeros(len(frames), dtype=bool))
    values: set[int] = set()
    caveats: Counter[str] = Counter()
    palette = True
    for t, frame in enumerate(frames):
        path = mask_file(folder, frame)
        if not path.is_file():
            predicted.missing.append(f"{name}/{frame}")
            continue
        png = _read_png(path, size)
        if isinstance(png, str):
            predicted.faults.append({"place": f"{name}/{frame}.png", "reason": png})
            continue
        masks[t], predicted.usable[t] = png.mask, True
        values |= png.values
        palette = palette and png.palette
        if png.caveat:
            caveats[png.caveat] += 1
    if len(predicted.missing) == len(frames):
        predicted.missing = [name]
    predicted.unexpected += unknown_files(name, frames, _file_names(folder))
    improper = value_cause(values, palette)
    if improper is not None:
        reason, cause = improper
        predicted.unexpected.append(Unexpected(place=name, reason=reason, cause=cause))
    for cause, count in caveats.items():
        reason = f"{count} of {len(frames)} masks are not 8-bit grey"
        predicted.unexpected.append(Unexpected(place=name, reason=reason, cause=cause))
    return predicted


def _file_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.is_dir()]
    except OSError:
        return []


def _read_png(path: Path, size: _Size) -> _Png | str:
    """Return the mask, or why it is unusable; the header is checked before pixels are decoded."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if (image.height, image.width) != size:
                return f"is {image.height} x {image.width}, not {size[0]} x {size[1]}"
            if image.mode not in _MODES:
                return f"has mode {image.mode}, not a single channel; save 8-bit grey, 0 or 255"
            return _decoded(image)
    except (*BROKEN, Image.DecompressionBombError) as error:
        return f"cannot be read ({type(error).__name__})"


def _decoded(image: Image.Image) -> _Png:
    pixels = np.asarray(image)
    if image.mode == "1":
        return _Png(pixels, frozenset(), palette=False)
    if image.mode in ("I", "I;16"):
        high = pixels >> 8
        extremes = frozenset({int(high.min()), int(high.max())})
        return _Png(high != 0, extremes, False, "16-bit masks, of which the upper 8 bits count")
    if image.mode == "L":
        return _Png(pixels != 0, _values(pixels), palette=False)
    mask = np.asarray(image.convert("L")) != 0
    same = np.array_equal(mask, pixels != 0)
    cause = "palette images in which black is not index 0, and colours count, not indices"
    return _Png(mask, _values(pixels), palette=True, caveat="" if same else cause)


def _values(pixels: np.ndarray) -> frozenset[int]:
    """Return the values of uint8 pixels; proper masks, the common case, need no histogram."""
    objects = np.count_nonzero(pixels)
    if np.count_nonzero(pixels == 255) == objects:
        return frozenset(([0] if objects < pixels.size else []) + ([255] if objects else []))
    return frozenset(np.flatnonzero(np.bincount(pixels.ravel(), minlength=256)).tolist())


def read_trace(
    root: Path, video: str, expression: str, n_frames: int
) -> tuple[KeyframeTrace | None, str | None]:
    """Return (trace, fault): the trace or None, and why it is unusable or None."""
    path = expression_folder(root, video, expression, allow_hidden=True) / TRACE_FILE
    if not path.is_file():
        return None, None
    try:
        # not pydantic's JSON reader: a model's answer may contain lone surrogates
        trace = KeyframeTrace.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        return None, ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")
    except (OSError, ValueError, RecursionError) as error:
        return None, f"cannot be read ({type(error).__name__})"
    if max(trace.keyframe, trace.initial_keyframe) >= n_frames:
        return None, f"a keyframe beyond the video's {n_frames} frames"
    if any(step.frame is not None and step.frame >= n_frames for step in trace.steps):
        return None, f"a step with a frame beyond the video's {n_frames} frames"
    return trace, None
