"""`mask_iou`: SAM2 in the loop. The answer's boxes and points become masks, which are compared.

Serves `ktg` and, from the frame that the answer chooses, `veason` (Veason-R1's consistency reward).
What the answer grounds on the keyframe is segmented there (`over: keyframe`) or
propagated over the row's clip (`over: clip`), and the value is the mean IoU of the union with the
true union, over the frames in which either has any pixel: leaving the target out earns nothing for
the frames that do not show it (the public reward pays 1 for each of them).

A row carries its clip in `extra_info.clip`, a JSON text (`data.clip_frames` writes it):

    {"frames": [paths], "keyframe": position, "masks": [COCO RLE of the union | null, …],
     "areas": [pixels of each]}

Masks need a segmenter: `load_reward(…, segmenter=…)`. Left out: making one, which needs torch
(`rcot_rl.inference.segmenter_actor.py`, and `rcot score --segmenter`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from rcot_rl.errors import InputError
from rcot_rl.protocol.grounding import Box, Point
from rcot_rl.recipe.base import Section
from reward_fns.baselines.veason_answer import veason_answer
from reward_fns.ground_truth import Frames, Objects
from reward_fns.registry import Response, Settings, Term, register

if TYPE_CHECKING:
    import numpy as np

KEY = "extra_info.clip"
MAX_OBJECTS = 32
"""Objects of an answer that are segmented. An answer with more earns nothing: each costs a
propagation, and no honest answer has so many."""


MAX_PIXELS = 1 << 26


class MaskRequest(msgspec.Struct):
    """What is to be segmented: prompts on one frame of a clip."""

    frames: list[str]
    """Paths, in order."""
    keyframe: int
    """Position of the frame that the prompts are on."""
    boxes: list[Box]
    """On the canvas."""
    points: list[Point | None]
    canvas: int
    """Side of the canvas in pixels."""


class Segmenter(Protocol):
    """Makes masks; `rcot_rl.inference.segmenter_actor` has the real ones."""

    def union_masks(self, requests: Sequence[MaskRequest]) -> list[np.ndarray]:
        """bool [T, H, W] for each request: the union of its objects, in the frames' own size."""
        ...


class MaskIoU(Section):
    """Parameters of `mask_iou`."""

    over: Literal["keyframe", "clip"] = "clip"
    """Compare on the keyframe alone, or over all frames of the clip."""


def _one(params: MaskIoU, settings: Settings) -> float:
    return 1.0


@register("mask_iou", params=MaskIoU, tasks=("ktg", "veason"), maximum=_one)
def mask_iou(
    response: Response, truth: Objects | Frames, params: MaskIoU, settings: Settings
) -> Term:
    """Mean IoU of the answer's masks. Raises InputError without a segmenter or a clip."""
    if response.segmenter is None:
        raise InputError(
            "mask_iou makes masks and was given no segmenter: `rcot score … --segmenter tiny` (or "
            "a SAM2 folder), `load_reward(…, segmenter=…)`, or take the component out (null)",
            key="segmenter",
        )
    clip = _clip(response.row)
    if isinstance(truth, Frames):
        if len(truth.ids) != len(clip.frames):
            raise InputError("needs the frames that the ground truth names", key=KEY)
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
        clip = _Clip([clip.frames[keyframe]], 0, [clip.masks[keyframe]])
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
        found_thw = response.segmenter.union_masks([request])[0]
    else:
        found_thw = [mask * False for mask in true_thw]
    return _compare(true_thw, found_thw, settings.zero_target)


def _compare(true_thw: Any, found_thw: Any, zero_target: bool) -> Term:
    scores = []
    for true, found in zip(true_thw, found_thw, strict=True):
        if true.shape != found.shape:
            raise InputError(f"masks are {true.shape}, the frames {found.shape}", key=KEY)
        union = int((true | found).sum())
        if union:
            scores.append(int((true & found).sum()) / union)
    if not scores:
        return Term(1.0) if zero_target else Term(0.0, ["ground_truth_empty"])
    value = sum(scores) / len(scores)
    return (
        Term(value) if value >= 1.0 else Term(value, ["mask_iou_low" if value else "mask_missed"])
    )


class _Rle(msgspec.Struct):
    size: tuple[int, int]
    counts: str


class _Clip(msgspec.Struct):
    frames: list[str]
    keyframe: int
    masks: list[_Rle | None]


def _clip(row: Any) -> _Clip:
    """The row's clip, checked. Raises InputError."""
    info = row.get("extra_info") if isinstance(row, dict) else None
    value = info.get("clip") if isinstance(info, dict) else None
    if value is None:
        raise InputError("missing; mask_iou needs shards with data.clip_frames", key=KEY)
    try:
        clip = (
            msgspec.json.decode(value, type=_Clip)
            if isinstance(value, str)
            else msgspec.convert(value, _Clip)
        )
    except (msgspec.MsgspecError, ValueError) as error:
        raise InputError(f"is no clip: {error}", key=KEY) from error
    n = len(clip.frames)
    if not n or len(clip.masks) != n or not 0 <= clip.keyframe < n:
        raise InputError("needs frames, a mask (or null) for each, and a keyframe in them", key=KEY)
    return clip


def _true_masks(clip: _Clip) -> list[np.ndarray]:
    """bool [H, W] a frame; null is an empty one of the others' size."""
    import numpy as np
    from hotcoco import mask as coco

    found: list[np.ndarray | None] = []
    for number, rle in enumerate(clip.masks):
        if rle is None:
            found.append(None)
            continue
        key = f"{KEY}.masks[{number}]"
        # the decoder ends the process where it finds no memory for a size
        if min(rle.size) < 1 or rle.size[0] * rle.size[1] > MAX_PIXELS:
            raise InputError(f"a mask of {rle.size[0]} x {rle.size[1]}", key=key)
        try:
            mask = coco.decode({"size": list(rle.size), "counts": rle.counts})
        except (ValueError, TypeError) as error:
            raise InputError(f"is no COCO RLE: {error}", key=key) from error
        found.append(mask.astype(bool))
    sizes = {mask.shape for mask in found if mask is not None}
    if len(sizes) > 1:
        raise InputError(f"masks of several sizes: {sorted(sizes)}", key=f"{KEY}.masks")
    if not sizes:
        import cv2

        image = cv2.imread(clip.frames[clip.keyframe])
        if image is None:
            raise InputError("not a readable image", file=clip.frames[clip.keyframe])
        sizes = {image.shape[:2]}
    shape = sizes.pop()
    return [np.zeros(shape, dtype=bool) if mask is None else mask for mask in found]


def clip_text(frames: Sequence[str], keyframe: int, masks: Sequence[np.ndarray]) -> str:
    """`extra_info.clip` of a row. masks: bool [H, W] of the targets' union in each frame."""
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
