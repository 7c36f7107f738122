"""`mask_iou`: SAM2 in the loop. Turns the answer's boxes and points into masks and compares them.

Supports `ktg` and, from the frame that the answer chooses, `veason` (Veason-R1's consistency
reward). The objects grounded on the keyframe are segmented there (`over: keyframe`) or propagated
over the row's clip (`over: clip`). The value is the mean IoU of their union with the true union,
over the frames in which either is not empty. Missing the target earns nothing for frames without it
(the public reward pays 1 for each of them).

A row has its clip in `extra_info.clip`, as JSON text (written with `data.clip_frames`):

    {"frames": [paths], "keyframe": position, "masks": [COCO RLE of the union | null, …],
     "areas": [pixels of each]}

Masks need a segmenter: `load_reward(…, segmenter=…)` or `rcot score --segmenter`. The shipped ones
need torch and live in `rcot_rl.segmentation.segmenter_actor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from rcot_rl.errors import InputError
from rcot_rl.protocol.grounding import Box, Point
from rcot_rl.protocol.row_clips import CLIP_KEY, RowClip, read_row_clip
from rcot_rl.recipe.base import Section
from reward_fns.baselines.veason_answer import veason_answer
from reward_fns.ground_truth import KeyframeTruth, Objects
from reward_fns.registry import Response, Settings, Term, register

if TYPE_CHECKING:
    import numpy as np

MAX_OBJECTS = 32
"""An answer with more objects earns nothing: each costs a propagation, and no honest answer has so
many."""

MAX_PIXELS = 1 << 26
"""Largest accepted size of a mask."""


class MaskRequest(msgspec.Struct):
    """Prompts on one frame of a clip, to be segmented."""

    frames: list[str]
    """Paths of the clip's frames, in order."""
    keyframe: int
    """Position of the prompted frame."""
    boxes: list[Box]
    """One box per object, on the canvas."""
    points: list[Point | None]
    """One point per object, on the canvas."""
    canvas: int
    """Side of the canvas in pixels."""


class MaskSegmenter(Protocol):
    """Makes masks; the implementations are in `rcot_rl.segmentation.segmenter_actor`."""

    def union_masks(self, requests: Sequence[MaskRequest]) -> list[np.ndarray]:
        """Return the union of the objects of each request, bool [T, H, W] in frame size."""
        ...


class MaskIoU(Section):
    """Parameters of `mask_iou`."""

    over: Literal["keyframe", "clip"] = "clip"
    """Compare only the keyframe, or all frames of the clip."""


@register("mask_iou", params=MaskIoU, tasks=("ktg", "veason"), maximum=1.0)
def mask_iou(
    response: Response, truth: Objects | KeyframeTruth, params: MaskIoU, settings: Settings
) -> Term:
    """Return the mean IoU of the answer's masks with the true masks. Raises InputError."""
    if response.segmenter is None:
        raise InputError(
            "mask_iou needs a segmenter: use `rcot score … --segmenter tiny` (or a SAM2 folder), "
            "`load_reward(…, segmenter=…)`, or remove the component (null)",
            key="segmenter",
        )
    clip = read_row_clip(
        response.row.get("extra_info") if isinstance(response.row, dict) else None,
        needs="masks",
        hint="mask_iou needs shards with data.clip_frames",
    )
    if isinstance(truth, KeyframeTruth):
        if len(truth.ids) != len(clip.frames):
            message = "must have one frame for each frame of the ground truth"
            raise InputError(message, key=CLIP_KEY)
        answer = veason_answer(response)
        if answer.keyframe not in truth.ids:
            return Term(0.0, [*answer.faults, "keyframe_unknown"])
        keyframe = truth.ids.index(answer.keyframe)
        prompts: list[tuple[Box | None, Point | None]] = [(box, None) for box in answer.boxes]
    else:
        grounding = response.grounding
        if not grounding.is_list:
            return Term(0.0, list(grounding.faults))
        keyframe = clip.keyframe
        prompts = [(item.box, item.point) for item in grounding.items]
    if len(prompts) > MAX_OBJECTS:
        return Term(0.0, ["objects_too_many"])
    if params.over == "keyframe":
        clip = RowClip([clip.frames[keyframe]], 0, [clip.masks[keyframe]])
        keyframe = 0
    request = MaskRequest(
        clip.frames,
        keyframe,
        [box for box, _ in prompts if box is not None],
        [point for box, point in prompts if box is not None],
        settings.canvas,
    )
    true_thw = _true_masks(clip)
    if request.boxes:
        predicted_thw = response.segmenter.union_masks([request])[0]
    else:
        predicted_thw = [mask * False for mask in true_thw]
    return _compare(true_thw, predicted_thw, settings.zero_target)


def _compare(true_thw: Any, predicted_thw: Any, zero_target: bool) -> Term:
    scores = []
    for true, predicted in zip(true_thw, predicted_thw, strict=True):
        if true.shape != predicted.shape:
            message = f"masks are {true.shape}, frames are {predicted.shape}"
            raise InputError(message, key=CLIP_KEY)
        union = int((true | predicted).sum())
        if union:
            scores.append(int((true & predicted).sum()) / union)
    if not scores:
        return Term(1.0) if zero_target else Term(0.0, ["ground_truth_empty"])
    value = sum(scores) / len(scores)
    return (
        Term(value) if value >= 1.0 else Term(value, ["mask_iou_low" if value else "mask_missed"])
    )


def _true_masks(clip: RowClip) -> list[np.ndarray]:
    """Return one mask per frame, bool [H, W]; null is an empty mask of the common size."""
    import numpy as np
    from hotcoco import mask as coco

    masks: list[np.ndarray | None] = []
    for number, rle in enumerate(clip.masks):
        if rle is None:
            masks.append(None)
            continue
        key = f"{CLIP_KEY}.masks[{number}]"
        # the decoder aborts the process if a size does not fit into memory
        if min(rle.size) < 1 or rle.size[0] * rle.size[1] > MAX_PIXELS:
            raise InputError(f"mask size {rle.size[0]} x {rle.size[1]} is not supported", key=key)
        try:
            mask = coco.decode({"size": list(rle.size), "counts": rle.counts})
        except (ValueError, TypeError) as error:
            raise InputError(f"not a COCO RLE: {error}", key=key) from error
        masks.append(mask.astype(bool))
    sizes = {mask.shape for mask in masks if mask is not None}
    if len(sizes) > 1:
        raise InputError(f"masks have different sizes: {sorted(sizes)}", key=f"{CLIP_KEY}.masks")
    if not sizes:
        import cv2

        image = cv2.imread(clip.frames[clip.keyframe])
        if image is None:
            raise InputError("not a readable image", file=clip.frames[clip.keyframe])
        sizes = {image.shape[:2]}
    shape = sizes.pop()
    return [np.zeros(shape, dtype=bool) if mask is None else mask for mask in masks]
