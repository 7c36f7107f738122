"""SAM2 for rewards: in this process (`LocalSegmenter`), or batched in a Ray actor of its own.

The reward workers of a run share one actor, made when it is first asked for and named after the
run's Ray namespace. It gathers what is asked within a few milliseconds and works it off as one
batch, so that the model is loaded once, whatever the number of reward workers.

RCOT_SEGMENTER and RCOT_SEGMENTER_DEVICE say what it loads; `training_environment` sets them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.inference.segmenter import Segmenter, load_segmenter, union
from reward_fns.components.mask_iou import MaskRequest

NAME = "rcot_segmenter"
GATHER_S = 0.005
TIMEOUT_S = 120.0


class LocalSegmenter:
    """`mask_iou.Segmenter` in this process. Raises InputError for an unknown spec."""

    def __init__(self, segmenter: str | Segmenter, device: str = "cpu") -> None:
        known = isinstance(segmenter, str)
        self._segmenter = load_segmenter(segmenter, device) if known else segmenter

    def union_masks(self, requests: Sequence[MaskRequest]) -> list[np.ndarray]:
        """bool [T, H, W] for each request. Raises InputError for frames that cannot be read."""
        return [self._one(request) for request in requests]

    def _one(self, request: MaskRequest) -> np.ndarray:
        frames_thwc = _frames(request.frames)
        height, width = frames_thwc.shape[1:3]
        scale = np.array([width, height], dtype=float) / request.canvas
        boxes = np.array(request.boxes, dtype=float) * np.tile(scale, 2)
        # without a point in its box, the middle of the box is what is left to go by
        points = [
            point if point is not None else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            for box, point in zip(request.boxes, request.points, strict=True)
        ]
        low, high = [0, 0, 0, 0], [width, height, width, height]
        boxes = np.clip(boxes, low, high)
        masks = self._segmenter.segment(
            frames_thwc, request.keyframe, boxes, np.array(points, dtype=float) * scale
        )
        return union(masks)


class SegmenterActor:
    """What runs in the Ray actor: `LocalSegmenter`, asked by many at once."""

    def __init__(self, spec: str, device: str) -> None:
        self._segmenter = LocalSegmenter(spec, device)
        self._waiting: list[tuple[MaskRequest, asyncio.Future[np.ndarray]]] = []
        self._working: asyncio.Task[None] | None = None
        self.batches: list[int] = []

    async def union_masks(self, request: MaskRequest) -> np.ndarray:
        """One request, worked off with all that come within GATHER_S."""
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_S)
            batch, self._waiting = self._waiting, []
            self.batches.append(len(batch))
            for request, future in batch:
                try:
                    masks = await asyncio.to_thread(self._segmenter.union_masks, [request])
                    future.set_result(masks[0])
                except Exception as error:  # the one who asked gets it, the next is served
                    future.set_exception(error)


class RemoteSegmenter:
    """`mask_iou.Segmenter` by way of the actor; a request that overruns raises TimeoutError."""

    def __init__(self, actor: Any, timeout_s: float = TIMEOUT_S) -> None:
        self._actor, self._timeout_s = actor, timeout_s

    def union_masks(self, requests: Sequence[MaskRequest]) -> list[np.ndarray]:
        """As `LocalSegmenter.union_masks`."""
        import ray

        asked = [self._actor.union_masks.remote(request) for request in requests]
        return ray.get(asked, timeout=self._timeout_s)


def segmenter_handle() -> RemoteSegmenter:
    """The run's segmenter, started by the first who asks. Raises InputError where none is named."""
    import ray

    spec = os.environ.get("RCOT_SEGMENTER")
    if not spec:
        raise InputError(
            "the reward makes masks, and RCOT_SEGMENTER names no segmenter for it", key="segmenter"
        )
    device = os.environ.get("RCOT_SEGMENTER_DEVICE", "cpu")
    remote = ray.remote(SegmenterActor)
    actor = remote.options(
        name=NAME,
        get_if_exists=True,
        num_cpus=1,
        num_gpus=0.01 if device == "cuda" else 0,
        max_concurrency=256,
        max_restarts=2,
    ).remote(spec, device)
    return RemoteSegmenter(actor)


def _frames(paths: Sequence[str]) -> np.ndarray:
    """uint8 [T, H, W, 3] RGB."""
    frames = []
    for path in paths:
        # boxes and labels are of the stored pixels, so an EXIF rotation must not be applied
        image = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise InputError("not a readable image", file=path)
        frames.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    if len({frame.shape for frame in frames}) != 1:
        raise InputError("frames of several sizes", file=paths[0])
    return np.stack(frames)
