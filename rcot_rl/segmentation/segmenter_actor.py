"""SAM2 for rewards: in this process (`LocalSegmenter`), or in a Ray actor that serves all workers.

A run's reward workers share one named actor in the run's Ray namespace, created on first use. It
collects the requests of a few milliseconds and processes them as one batch. The model is loaded
once, whatever the number of reward workers.

RCOT_SEGMENTER, RCOT_SEGMENTER_DEVICE and RCOT_SEGMENTER_SETTINGS (the recipe's `segmenter` section
as JSON) say what it loads and how; `training_environment` sets them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import cv2
import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.recipe.inference_section import SegmenterSection
from rcot_rl.segmentation.clip_frames import ClipFrames
from rcot_rl.segmentation.mask_store import (
    MaskStore,
    StoredMasks,
    decode_mask,
    encode_mask,
    masks_key,
)
from rcot_rl.segmentation.segmenter import VideoSegmenter, check_segmenter, load_segmenter, union
from reward_fns.components.mask_iou import MaskRequest

NAME = "rcot_segmenter"
GATHER_S = 0.005
TIMEOUT_S = 120.0


class LocalSegmenter:
    """`mask_iou.MaskSegmenter` in this process."""

    def __init__(
        self,
        segmenter: str | VideoSegmenter | Callable[[], VideoSegmenter],
        store: MaskStore | None = None,
    ) -> None:
        """Check the spec; the segmenter is loaded with the first request. Raises InputError.

        Args:
            segmenter: A spec of `load_segmenter`, or a loaded segmenter.
            store: Has the masks of equal prompts; gets those that it lacks.
        """
        if isinstance(segmenter, str):
            check_segmenter(segmenter)
        self._source = segmenter
        self._store = store

    @cached_property
    def _segmenter(self) -> VideoSegmenter:
        if isinstance(self._source, str):
            return load_segmenter(self._source)
        return self._source() if callable(self._source) else self._source

    def union_masks(self, requests: Sequence[MaskRequest]) -> list[np.ndarray]:
        """Return bool `[T, H, W]` per request: the union of its objects. Raises InputError."""
        return [self._one(request) for request in requests]

    def _one(self, request: MaskRequest) -> np.ndarray:
        frames = _frames(request.frames)
        height, width = frames[request.keyframe].shape[:2]
        scale = np.array([width, height], dtype=float) / request.canvas
        boxes = np.array(request.boxes, dtype=float) * np.tile(scale, 2)
        # an object without a point is prompted at its box's centre
        points = [
            point if point is not None else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            for box, point in zip(request.boxes, request.points, strict=True)
        ]
        low, high = [0, 0, 0, 0], [width, height, width, height]
        boxes = np.clip(boxes, low, high)
        prompts = request.keyframe, boxes, np.array(points, dtype=float) * scale
        key = None
        if self._store is not None:
            key = masks_key(self._segmenter, frames, *prompts)
            stored = self._store.get(key)
            if stored is not None:
                return np.stack([decode_mask(png) for png in stored.pngs])
        started = time.perf_counter()
        out = np.empty((len(frames), height, width), dtype=bool)
        for t, masks in self._segmenter.segment(frames, *prompts):
            out[t] = union(masks)
        if self._store is not None:
            seconds = time.perf_counter() - started
            pngs = tuple(encode_mask(mask) for mask in out)
            self._store.put(key, StoredMasks(pngs, (height, width), seconds))
        return out


class SegmenterActor:
    """The Ray actor's class: a `LocalSegmenter` with a queue."""

    def __init__(self, spec: str, device: str, settings: SegmenterSection | None = None) -> None:
        """Load the segmenter `spec` on `device`."""
        self._segmenter = LocalSegmenter(load_segmenter(spec, device, settings))
        self._waiting: list[tuple[MaskRequest, asyncio.Future[np.ndarray]]] = []
        self._working: asyncio.Task[None] | None = None
        self.batches: list[int] = []

    async def union_masks(self, request: MaskRequest) -> np.ndarray:
        """Return bool `[T, H, W]`; requests that arrive within GATHER_S form one batch."""
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
                except Exception as error:  # reported to the caller; the next request is served
                    future.set_exception(error)


class RemoteSegmenter:
    """`mask_iou.MaskSegmenter` in the actor; raises TimeoutError after `timeout_s` seconds."""

    def __init__(self, actor: Any, timeout_s: float = TIMEOUT_S) -> None:
        self._actor, self._timeout_s = actor, timeout_s

    def union_masks(self, requests: Sequence[MaskRequest]) -> list[np.ndarray]:
        """Return bool `[T, H, W]` per request, as `LocalSegmenter.union_masks`."""
        import ray

        pending = [self._actor.union_masks.remote(request) for request in requests]
        return ray.get(pending, timeout=self._timeout_s)


def segmenter_handle() -> RemoteSegmenter:
    """Return the run's segmenter actor, started by the first call. Raises InputError."""
    import ray

    spec = os.environ.get("RCOT_SEGMENTER")
    if not spec:
        raise InputError(
            "the reward makes masks, but RCOT_SEGMENTER names no segmenter", key="segmenter"
        )
    device = os.environ.get("RCOT_SEGMENTER_DEVICE", "cpu")
    settings = SegmenterSection.model_validate_json(os.environ.get("RCOT_SEGMENTER_SETTINGS", "{}"))
    remote = ray.remote(SegmenterActor)
    actor = remote.options(
        name=NAME,
        get_if_exists=True,
        num_cpus=1,
        num_gpus=0.01 if device == "cuda" else 0,
        max_concurrency=256,
        max_restarts=2,
    ).remote(spec, device, settings)
    return RemoteSegmenter(actor)


def _frames(paths: Sequence[str]) -> ClipFrames:
    def read(t: int) -> np.ndarray:
        # boxes and labels refer to the stored pixels, so EXIF rotation must not be applied
        image = cv2.imread(paths[t], cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise InputError("not a readable image", file=paths[t])
        return image

    return ClipFrames(len(paths), read, paths.__getitem__)
