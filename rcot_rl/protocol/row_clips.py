"""The clip of a shard's row, and the video metadata that processors need.

A row's clip is a JSON text in `extra_info.clip` (written where `data.clip_frames` is set):

    {"frames": [paths], "keyframe": position,
     "masks": [COCO RLE of the targets' union | null, …], "areas": [pixels of each mask]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from rcot_rl.errors import InputError

if TYPE_CHECKING:
    import numpy as np

CLIP_KEY = "extra_info.clip"


class CocoRle(msgspec.Struct):
    """A compressed COCO run-length encoding."""

    size: tuple[int, int]
    """Height and width in pixels."""
    counts: str


class RowClip(msgspec.Struct):
    """The clip of a shard's row."""

    frames: list[str]
    """Paths of the images, in order."""
    keyframe: int
    """Position of the row's own frame in `frames`."""
    masks: list[CocoRle | None] = []
    """Union of the targets in each frame; None: no target is visible."""
    areas: list[int] = []
    """Pixels of each mask."""


def read_row_clip(extra_info: Any, *, needs: Literal["masks", "areas"], hint: str) -> RowClip:
    """Return the clip of a row. Raises InputError.

    Args:
        extra_info: The row's `extra_info`; its `clip` is a JSON text or the decoded object.
        needs: The field that must have one entry per frame; the other one may be absent.
        hint: Added to the error if the row has no clip: who needs one, and which settings write it.
    """
    value = extra_info.get("clip") if isinstance(extra_info, dict) else None
    if not value:
        raise InputError(f"missing; {hint}", key=CLIP_KEY)
    try:
        clip = (
            msgspec.json.decode(value, type=RowClip)
            if isinstance(value, str)
            else msgspec.convert(value, RowClip)
        )
    except (msgspec.MsgspecError, ValueError) as error:
        raise InputError(f"not a valid clip: {error}", key=CLIP_KEY) from error
    n_frames = len(clip.frames)
    if len(getattr(clip, needs)) != n_frames or not 0 <= clip.keyframe < n_frames:
        raise InputError(
            f"needs at least one frame, {needs} with one entry per frame, and a keyframe that is a "
            f"position in frames (frames: {n_frames}, {needs}: {len(getattr(clip, needs))}, "
            f"keyframe: {clip.keyframe})",
            key=CLIP_KEY,
        )
    return clip


def clip_text(frames: Sequence[str], keyframe: int, masks: Sequence[np.ndarray]) -> str:
    """Return the JSON text of a row's clip.

    Args:
        keyframe: Position of the row's own frame.
        masks: bool `[H, W]` per frame, the union of the targets.
    """
    import numpy as np
    from hotcoco import mask as coco

    rles: list[dict[str, Any] | None] = []
    for mask in masks:
        rle = coco.encode(np.asfortranarray(mask.astype(np.uint8))) if mask.any() else None
        if rle is not None and isinstance(rle["counts"], bytes):
            rle = {"size": list(map(int, rle["size"])), "counts": rle["counts"].decode("ascii")}
        rles.append(rle)
    areas = [int(mask.sum()) for mask in masks]
    return json.dumps({"frames": list(frames), "keyframe": keyframe, "masks": rles, "areas": areas})


def video_metadata(n_frames: int, fps: float) -> dict[str, Any]:
    """Return the `video_metadata` of a clip of which all frames are shown, `fps` per second."""
    return {"fps": fps, "total_num_frames": n_frames}
