"""What turns a key frame's boxes and points into masks, and how one is chosen by name.

The paper uses SAM2 (frozen); `flow` needs no weights and `tiny` ships with the package. Whoever
prints a result prints the segmenter's `name` with it, as scores depend on it as much as on the
policy.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Protocol

import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.files import visible
from rcot_rl.recipe.schema import Recipe

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny-sam2"
# owner/name as the hub spells it; anything else is meant as a path
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_VIDEO_TYPE = "sam2_video"
DTYPES = ("float32", "bfloat16")


class Segmenter(Protocol):
    """Makes masks of prompted objects in every frame of a clip."""

    name: str
    """What made the masks, for people to read."""

    def segment(
        self,
        frames_thwc: np.ndarray,
        key: int,
        boxes_source: np.ndarray,
        points_source: np.ndarray | None,
    ) -> np.ndarray:
        """bool [N, T, H, W] from prompts in frame `key` (eq. 6 of the paper, for each object).

        frames_thwc: uint8 [T, H, W, 3] RGB. boxes_source: float [N, 4] x1, y1, x2, y2;
        points_source: float [N, 2] x, y, or None for boxes alone; both in source pixels. N may
        be 0.
        """
        ...


def union(masks_nthw: np.ndarray) -> np.ndarray:
    """bool [T, H, W]: where any of the objects [N, T, H, W] is (eq. 7); empty for N = 0."""
    return masks_nthw.any(axis=0)


def load_segmenter(spec: str, device: str = "cpu", dtype: str = "float32") -> Segmenter:
    """The segmenter that `spec` names, ready to use.

    spec: `tiny` (the shipped SAM2), `flow` (OpenCV, no weights), a folder in transformers'
    Sam2Video format, or a hub id such as facebook/sam2.1-hiera-large. device and dtype (float32 or
    bfloat16): of the SAM2 ones. Raises InputError when `spec` is none of them or cannot be loaded,
    or for another dtype.
    """
    if dtype not in DTYPES:
        raise InputError(f"is {dtype!r}, expected one of {', '.join(DTYPES)}", key="dtype")
    source = check_segmenter(spec)
    if source is None:
        from rcot_rl.inference.flow_propagator import FlowSegmenter

        return FlowSegmenter()
    from rcot_rl.inference.sam2 import Sam2Segmenter

    return Sam2Segmenter.load(source, device, dtype)


def label_judge(recipe: Recipe) -> Segmenter | None:
    """The recipe's segmenter where labels are held against it (`data.alignment.level: sam2`)."""
    if recipe.data.alignment.level != "sam2":
        return None
    return load_segmenter(recipe.models.segmenter, recipe.device)


def check_segmenter(spec: str) -> str | None:
    """The folder or hub id that `spec` means, None for `flow`; without importing torch.

    Raises InputError when it is none of them, or a folder that holds no SAM2.
    """
    if spec == "flow":
        return None
    source = str(TINY) if spec == "tiny" else spec
    folder = Path(source)
    if folder.exists():
        _check_folder(folder)
    elif not _HUB_ID.fullmatch(spec):
        raise InputError(
            "no such folder; expected tiny, flow, a Sam2Video folder or a hub id", file=source
        )
    return source


def _check_folder(folder: Path) -> None:
    """Says what is missing before torch is imported, which takes seconds."""
    config = folder / "config.json"
    if not config.is_file():
        raise InputError("not a Sam2Video folder: no config.json in it", file=folder)
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", file=config) from error
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != _VIDEO_TYPE:
        raise InputError(f"is {found!r}, expected {_VIDEO_TYPE!r}", file=config, key="model_type")
    if not visible(folder.glob("*.safetensors")):
        raise InputError("not a Sam2Video folder: no .safetensors weights in it", file=folder)
