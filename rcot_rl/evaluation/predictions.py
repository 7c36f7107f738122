"""Predicted masks and the traces beside them, read from a folder that nobody vouches for.

    DIR/<video>/<expression_id>/<frame>.png      single channel, 0 or 255
    DIR/<video>/<expression_id>/trace.json       where the pipeline looked and what it boxed

Every pixel that is not 0 is foreground, as in the public scripts; they read a palette image by its
colours and the upper 8 of 16 bits, and so does this module. Values other than 0 and 255 (or 0 and
1) are reported.

What is missing or broken is reported, never raised: a run's predictions are scored whatever they
hold. Only an id of the corpus that cannot name a folder is an InputError.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from rcot_rl.errors import InputError
from rcot_rl.evaluation.unexpected import Unexpected, unknown_files, value_cause

TRACE = "trace.json"
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_MODES = ("1", "L", "P", "I;16", "I")
_Size = tuple[int, int]
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

    unexpected: list[Unexpected] = field(default_factory=list)
    """Names and values that the masks should not have."""


class _Png(NamedTuple):
    """One decoded mask."""

    mask: np.ndarray
    """bool [H, W]"""
    values: frozenset[int]
    palette: bool
    odd: str = ""
    """Why its pixels may not mean what they seem to."""


def expression_folder(root: Path, video: str, expression: str) -> Path:
    """ROOT/<video>/<expression>, which lies below ROOT whatever the ids are, or InputError."""
    for name in (video, expression):
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
            raise InputError("this id cannot name a folder of predictions", key=name)
    return root / video / expression


def first_size(root: Path, video: str, expression: str, frames: Sequence[str]) -> _Size | None:
    """Return (H, W) of the first mask of `frames` (stems) whose header is readable."""
    folder = expression_folder(root, video, expression)
    for frame in frames:
        try:
            with Image.open(folder / f"{frame}.png", formats=["PNG"]) as image:
                return image.height, image.width
        except (*_BROKEN, Image.DecompressionBombError):
            continue
    return None


def read_masks(
    root: Path, video: str, expression: str, frames: Sequence[str], size: _Size
) -> Predicted:
    """The masks of `frames` (stems), which should be of `size` (H, W)."""
    folder = expression_folder(root, video, expression)
    name = f"{video}/{expression}"
    found = Predicted(np.zeros((len(frames), *size), dtype=bool), np.zeros(len(frames), dtype=bool))
    values: set[int] = set()
    odd: dict[str, int] = {}
    palette = True
    for t, frame in enumerate(frames):
        path = folder / f"{frame}.png"
        if not path.is_file():
            found.missing.append(f"{name}/{frame}")
            continue
        png = _read_png(path, size)
        if isinstance(png, str):
            found.faults.append({"place": f"{name}/{frame}.png", "reason": png})
            continue
        found.masks_thw[t], found.usable[t] = png.mask, True
        values |= png.values
        palette = palette and png.palette
        if png.odd:
            odd[png.odd] = odd.get(png.odd, 0) + 1
    if len(found.missing) == len(frames):
        found.missing = [name]
    found.unexpected += unknown_files(name, frames, _file_names(folder))
    improper = value_cause(values, palette)
    if improper is not None:
        found.unexpected.append(Unexpected(place=name, reason=improper[0], cause=improper[1]))
    for cause, count in odd.items():
        reason = f"{count} of {len(frames)} masks are not 8-bit grey"
        found.unexpected.append(Unexpected(place=name, reason=reason, cause=cause))
    return found


def _file_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.is_dir()]
    except OSError:
        return []


def _read_png(path: Path, size: _Size) -> _Png | str:
    """The mask, or the reason why not. The header is checked before pixels are decoded."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if (image.height, image.width) != size:
                return f"is {image.height} x {image.width}, not {size[0]} x {size[1]}"
            if image.mode not in _MODES:
                return f"has mode {image.mode}, not a single channel; save 8-bit grey, 0 or 255"
            return _decoded(image)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        return f"cannot be read ({type(error).__name__})"


def _decoded(image: Image.Image) -> _Png:
    pixels = np.asarray(image)
    if image.mode == "1":
        return _Png(pixels, frozenset(), palette=False)
    if image.mode in ("I", "I;16"):
        high = pixels >> 8
        seen = {int(high.min()), int(high.max())}
        return _Png(
            high != 0, frozenset(seen), False, "16-bit masks, of which the upper 8 bits count"
        )
    if image.mode == "L":
        return _Png(pixels != 0, _values(pixels), palette=False)
    mask = np.asarray(image.convert("L")) != 0
    same = np.array_equal(mask, pixels != 0)
    cause = "palette images in which black is not index 0, and colours count, not indices"
    return _Png(mask, _values(pixels), palette=True, odd="" if same else cause)


def _values(pixels: np.ndarray) -> frozenset[int]:
    """The values of uint8 pixels. Proper masks, which most are, need no histogram."""
    objects = np.count_nonzero(pixels)
    if np.count_nonzero(pixels == 255) == objects:
        return frozenset(([0] if objects < pixels.size else []) + ([255] if objects else []))
    return frozenset(np.flatnonzero(np.bincount(pixels.ravel(), minlength=256)).tolist())


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
