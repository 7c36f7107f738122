"""Segmenters, which turn a keyframe's boxes and points into masks, and their choice by name.

The paper uses frozen SAM2; `flow` needs no weights, and `tiny` ships with the package. Results are
printed with the segmenter's `name`, because scores depend on it as much as on the policy.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.recipe.inference_section import SegmenterSection
from rcot_rl.recipe.schema import Recipe
from rcot_rl.segmentation.clip_frames import FrameSequence
from rcot_rl.weights import PICKLES, refuse_pointer, weight_shapes

logger = logging.getLogger(__name__)

DEFAULT = "facebook/sam2.1-hiera-large"
TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny-sam2"
# owner/name as the hub spells it; anything else is a path
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
FLOW_NAME = "flow (GrabCut + DIS)"
_VIDEO_TYPE = "sam2_video"

FrameMasks = tuple[int, np.ndarray]
"""A frame index, and bool `[N, H, W]` masks of N objects in this frame."""


class VideoSegmenter(Protocol):
    """Makes masks of prompted objects in every frame of a clip.

    One whose masks may be kept (`mask_store`) also has `identity`, a text that differs if its masks
    may differ: weights, settings and versions.
    """

    name: str
    """Readable name, recorded with every result."""

    def segment(
        self,
        frames: FrameSequence,
        key: int,
        boxes_source: np.ndarray,
        points_source: np.ndarray | None,
    ) -> Iterator[FrameMasks]:
        """Propagate N objects from their prompts in one frame (eq. 6 of the paper, per object).

        Neither the clip nor its masks are held in memory as a whole. An error of `frames` ends the
        iteration.

        Args:
            frames: The clip.
            key: Index of the prompted frame.
            boxes_source: float `[N, 4]` x1, y1, x2, y2 in source pixels; N may be 0.
            points_source: float `[N, 2]` x, y in source pixels, or None: boxes alone.

        Yields:
            Each frame once: `key` and the later ones in ascending order, then the earlier ones in
            descending order. Masks are bool `[N, H, W]`.
        """
        ...


def collect(masks: Iterable[FrameMasks]) -> np.ndarray:
    """Return bool `[N, T, H, W]`, all masks of a short clip in memory."""
    by_frame = dict(masks)
    return np.stack([by_frame[t] for t in range(len(by_frame))], axis=1)


def union(masks_nhw: np.ndarray) -> np.ndarray:
    """Return bool `[H, W]`: the union of N objects' masks (eq. 7); empty for N = 0."""
    return np.any(masks_nhw, axis=0)


def no_masks(frames: FrameSequence, key: int) -> Iterator[FrameMasks]:
    """Yield what `VideoSegmenter.segment` does for N = 0; reads no frame but `key`."""
    empty = np.zeros((0, *frames[key].shape[:2]), dtype=bool)
    for t in visiting_order(len(frames), key):
        yield t, empty


def visiting_order(length: int, key: int) -> list[int]:
    """Return frame indices in the order of `VideoSegmenter.segment`."""
    return [*range(key, length), *range(key - 1, -1, -1)]


def load_segmenter(
    spec: str, device: str = "cpu", settings: SegmenterSection | None = None
) -> VideoSegmenter:
    """Load the segmenter that `spec` names. Raises InputError.

    Args:
        spec: `tiny` (the shipped SAM2), `flow` (OpenCV, no weights), a folder in transformers'
            Sam2Video format, a checkpoint file of the original SAM2 such as sam2.1_hiera_large.pt,
            or a hub id such as facebook/sam2.1-hiera-large.
        device: Where SAM2 runs; `flow` ignores it.
        settings: How SAM2 runs; `flow` ignores it.
    """
    source = check_segmenter(spec)
    if source is None:
        from rcot_rl.segmentation.flow_propagator import FlowSegmenter

        logger.info("segmenter: flow (OpenCV)")
        return FlowSegmenter()
    from rcot_rl.segmentation.sam2 import Sam2Segmenter

    return Sam2Segmenter.load(source, device, settings)


def segmenter_name(spec: str) -> str:
    """Return the `name` of the segmenter that `spec` names, without loading it."""
    source = check_segmenter(spec)
    return FLOW_NAME if source is None else f"sam2:{Path(source).name}"


def label_judge(recipe: Recipe) -> VideoSegmenter | None:
    """Return the recipe's segmenter if it checks labels (`data.alignment.level: sam2`), or None."""
    if recipe.data.alignment.level != "sam2":
        return None
    return load_segmenter(recipe.models.segmenter, recipe.device, recipe.segmenter)


def check_segmenter(spec: str) -> str | None:
    """Return the path or hub id of `spec`, None for `flow`, without torch. Raises InputError."""
    if spec == "flow":
        return None
    source = str(TINY) if spec == "tiny" else spec
    path = Path(source)
    if path.is_dir():
        check_segmenter_folder(path)
    elif path.exists():
        _check_file(path)
    elif path.suffix in PICKLES:
        raise InputError(f"no such file; its hub id would be {_hub_id(path)}", file=source)
    elif not _HUB_ID.fullmatch(spec):
        raise InputError(
            "no such path; expected tiny, flow, a Sam2Video folder, a .pt file of SAM2 or a hub id",
            file=source,
        )
    return source


def _hub_id(file: Path) -> str:
    """Return the hub id of the model whose checkpoint has this name, else the default model's."""
    name = file.stem.replace("_", "-")
    return f"facebook/{name}" if re.fullmatch(r"sam2(\.1)?-hiera-[a-z-]{1,20}", name) else DEFAULT


def _check_file(file: Path) -> None:
    """Raise InputError unless `file` is a complete PyTorch checkpoint."""
    refuse_pointer(file)
    if file.suffix not in PICKLES:
        raise InputError(
            "is a file, but not a .pt checkpoint of SAM2; name the folder of a Sam2Video model",
            file=file,
        )
    if not zipfile.is_zipfile(file):  # the directory is at the end, so it shows truncation
        raise InputError(
            "is not a complete PyTorch checkpoint; copy or download it again, or name its hub id, "
            f"e.g. {_hub_id(file)}",
            file=file,
        )


def check_segmenter_folder(folder: Path) -> None:
    """Raise InputError unless a folder has a complete transformers SAM2; imports no torch."""
    config = folder / "config.json"
    if not config.is_file():
        pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise InputError(
                f"has no config.json; to use the checkpoint of the original SAM2, name {pickles[0]}"
                " itself",
                file=folder,
            )
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
