"""Segmenters, which turn a keyframe's boxes and points into masks, and their choice by name.

The paper uses frozen SAM2; `flow` needs no weights, and `tiny` ships with the package. Results are
printed with the segmenter's `name`, because scores depend on it as much as on the policy.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe
from rcot_rl.weights import PICKLES, refuse_pointer, weight_shapes

logger = logging.getLogger(__name__)

DEFAULT = "facebook/sam2.1-hiera-large"
TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny-sam2"
# owner/name as the hub spells it; anything else is a path
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_VIDEO_TYPE = "sam2_video"

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(Dtype)


class VideoSegmenter(Protocol):
    """Makes masks of prompted objects in every frame of a clip."""

    name: str
    """Readable name, recorded with every result."""

    def segment(
        self,
        frames_thwc: np.ndarray,
        key: int,
        boxes_source: np.ndarray,
        points_source: np.ndarray | None,
    ) -> np.ndarray:
        """Propagate N objects from their prompts in one frame (eq. 6 of the paper, per object).

        Args:
            frames_thwc: uint8 `[T, H, W, 3]` RGB.
            key: Index of the prompted frame.
            boxes_source: float `[N, 4]` x1, y1, x2, y2 in source pixels; N may be 0.
            points_source: float `[N, 2]` x, y in source pixels, or None: boxes alone.

        Returns:
            bool `[N, T, H, W]`.
        """
        ...


def union(masks_nthw: np.ndarray) -> np.ndarray:
    """Return bool `[T, H, W]`: the union of N objects' masks (eq. 7); empty for N = 0."""
    return np.any(masks_nthw, axis=0)


def load_segmenter(spec: str, device: str = "cpu", dtype: Dtype = "float32") -> VideoSegmenter:
    """Load the segmenter that `spec` names. Raises InputError.

    Args:
        spec: `tiny` (the shipped SAM2), `flow` (OpenCV, no weights), a folder in transformers'
            Sam2Video format, or a hub id such as facebook/sam2.1-hiera-large.
        device: Where SAM2 runs; `flow` ignores it.
        dtype: SAM2's dtype, float32 or bfloat16; `flow` ignores it.
    """
    if dtype not in DTYPES:
        raise InputError(f"is {dtype!r}, expected one of {', '.join(DTYPES)}", key="dtype")
    source = check_segmenter(spec)
    if source is None:
        from rcot_rl.segmentation.flow_propagator import FlowSegmenter

        logger.info("segmenter: flow (OpenCV)")
        return FlowSegmenter()
    from rcot_rl.segmentation.sam2 import Sam2Segmenter

    segmenter = Sam2Segmenter.load(source, device, dtype)
    logger.info("segmenter: SAM2 from %s on %s in %s", source, device, dtype)
    return segmenter


def label_judge(recipe: Recipe) -> VideoSegmenter | None:
    """Return the recipe's segmenter if it checks labels (`data.alignment.level: sam2`), or None."""
    if recipe.data.alignment.level != "sam2":
        return None
    return load_segmenter(recipe.models.segmenter, recipe.device)


def check_segmenter(spec: str) -> str | None:
    """Return the folder or hub id of `spec`, None for `flow`, without torch. Raises InputError."""
    if spec == "flow":
        return None
    source = str(TINY) if spec == "tiny" else spec
    folder = Path(source)
    if folder.is_file() or folder.suffix in PICKLES:
        _refuse_file(folder)
    if folder.exists():
        check_segmenter_folder(folder)
    elif not _HUB_ID.fullmatch(spec):
        raise InputError(
            "no such folder; expected tiny, flow, a Sam2Video folder or a hub id", file=source
        )
    return source


def _refuse_file(file: Path) -> None:
    """Raise the InputError about a weights file, which suggests what to name instead."""
    name = file.stem.replace("_", "-")
    hub = f"facebook/{name}" if re.fullmatch(r"sam2(\.1)?-hiera-[a-z-]{1,20}", name) else DEFAULT
    kind = "a checkpoint file of the original SAM2" if file.suffix in PICKLES else "a file"
    raise InputError(
        f"is {kind}; name a folder in transformers' Sam2Video format or its hub id, e.g. {hub}",
        file=file,
    )


def check_segmenter_folder(folder: Path) -> None:
    """Raise InputError unless a folder has a complete transformers SAM2; imports no torch."""
    config = folder / "config.json"
    if not config.is_file():
        pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            _refuse_file(pickles[0])
        raise InputError("not a Sam2Video folder: no config.json in it", file=folder)
    refuse_pointer(config)
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", file=config) from error
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type != _VIDEO_TYPE:
        raise InputError(
            f"is {model_type!r}, expected {_VIDEO_TYPE!r}", file=config, key="model_type"
        )
    weight_shapes(folder)
