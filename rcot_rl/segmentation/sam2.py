"""SAM2 segmentation: the keyframe's boxes and points, propagated both ways (paper, eq. 6).

The model is transformers' `Sam2VideoModel` with its own inference session, for released weights and
the shipped tiny ones alike. Its processor is not used: it needs torchvision, and does no more than
`preprocess` and `_decide` below. Objects are tracked independently, so their masks may overlap, as
in the original. Memory does not grow with the clip: frames are kept as bytes, image features up to
a limit, and an object's memory up to the number of frames that the model attends to. Not
implemented: prompts on several frames.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from rcot_rl.errors import InputError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
BOX_FIRST, BOX_SECOND, POSITIVE = 2, 3, 1  # SAM's prompt labels; a box's corners come first


FEATURE_BYTES = 2 << 30
"""Maximum bytes of image features on the model's device. SAM2.1-large needs 8 MiB per frame in
bf16, so all queries of a video of 250 frames share them."""


def preprocess(
    frames_thwc: np.ndarray, side: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Resize and normalize frames for SAM2, which was trained without keeping the aspect ratio.

    Frames are resized on the host and normalized on `device`, so that bytes are copied, not floats.

    Args:
        frames_thwc: uint8 `[T, H, W, 3]` RGB.

    Returns:
        float32 `[T, 3, side, side]`, normalized with ImageNet's mean and standard deviation.
    """
    if frames_thwc.shape[1:3] != (side, side):
        shrink = frames_thwc.shape[1] * frames_thwc.shape[2] > side * side
        how = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
        frames_thwc = np.stack(
            [cv2.resize(f, (side, side), interpolation=how) for f in frames_thwc]
        )
    pixels = torch.from_numpy(np.ascontiguousarray(frames_thwc)).to(device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(255.0).sub_(mean).div_(std)


class _SessionFrames(Mapping[int, torch.Tensor]):
    """A session's video. Frames are preprocessed on request: 1 byte per value is kept, not 4."""

    def __init__(
        self, frames_thwc: np.ndarray, side: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._frames, self._side, self._device, self._dtype = frames_thwc, side, device, dtype

    def __getitem__(self, t: int) -> torch.Tensor:
        return preprocess(self._frames[t : t + 1], self._side, self._device)[0].to(self._dtype)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self._frames)


class FeatureStore:
    """An LRU cache of image features by the frame's content.

    Several queries about one video, and both passes of each, share a frame's features: with few
    objects, most of SAM2's work is the image encoder.
    """

    def __init__(self, most_bytes: int = FEATURE_BYTES) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._kept: OrderedDict[bytes, tuple[int, dict[str, Any]]] = OrderedDict()

    def get(self, key: bytes) -> dict[str, Any] | None:
        """Return the features of the frame with digest `key`, or None."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def put(self, key: bytes, features: dict[str, Any]) -> None:
        """Keep features; the newest ones stay even if they alone exceed the limit."""
        # position encodings are shared by all frames and not counted
        size = sum(t.numel() * t.element_size() for t in features["vision_feats"])
        self._kept[key] = (size, features)
        self.bytes += size
        while self.bytes > self.most_bytes and len(self._kept) > 1:
            self.bytes -= self._kept.popitem(last=False)[1][0]


class _SharedFeatures:
    """A session's cache of vision features: a view of the store by frame index."""

    def __init__(self, store: FeatureStore, frames_thwc: np.ndarray) -> None:
        self._store, self._frames = store, frames_thwc
        self._digests: dict[int, bytes] = {}

    def cache_vision_features(self, frame_idx: int, features: dict[str, Any]) -> None:
        """Keep the features of a frame."""
        self._store.put(self._digest(frame_idx), features)

    def get_vision_features(self, frame_idx: int) -> dict[str, Any] | None:
        """Return the features of a frame, or None."""
        return self._store.get(self._digest(frame_idx))

    def clear_all(self) -> None:
        """Part of the session's interface; the store outlives sessions."""

    def _digest(self, t: int) -> bytes:
        if t not in self._digests:
            frame = np.ascontiguousarray(self._frames[t])
            size = np.array(frame.shape).tobytes()
            self._digests[t] = hashlib.blake2b(frame.data, digest_size=16, salt=size[:16]).digest()
        return self._digests[t]


class Sam2Segmenter:
    """SAM2 from a transformers Sam2Video folder (or a model id that transformers can resolve)."""

    def __init__(self, model: Sam2VideoModel, name: str) -> None:
        self.model = model.eval()
        self.name = name
        self.features = FeatureStore()

    @classmethod
    def load(cls, source: str | Path, device: str = "cpu", dtype: str = "float32") -> Sam2Segmenter:
        """Load a model. Raises InputError.

        Args:
            source: Folder or hub id.
            dtype: Name of a torch dtype; memory features are always bfloat16.
        """
        from_pretrained: Any = Sam2VideoModel.from_pretrained
        try:
            model, loading_info = from_pretrained(
                str(source), dtype=getattr(torch, dtype), output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            message = f"cannot be loaded as a SAM2 video model: {reason}"
            raise InputError(message, file=source) from error
        # transformers would initialise these randomly and continue
        missing = sorted(loading_info["missing_keys"])
        if missing:
            message = f"lacks {len(missing)} weights of a SAM2 video model"
            raise InputError(message, file=source, key=missing[0])
        return cls(model.to(device), f"sam2:{Path(source).name}")

    @torch.no_grad()
    def segment(
        self,
        frames_thwc: np.ndarray,
        key: int,
        boxes_source: np.ndarray,
        points_source: np.ndarray | None,
    ) -> np.ndarray:
        """Return bool `[N, T, H, W]`; arguments as in `VideoSegmenter.segment`.

        Propagates forward, then backward. Each pass sees only the keyframe and its own side, so the
        order of the passes does not matter.
        """
        return self._segment(frames_thwc, key, boxes_source, points_source, (False, True))

    def _segment(
        self,
        frames: np.ndarray,
        key: int,
        boxes: np.ndarray,
        points: np.ndarray | None,
        passes: tuple[bool, ...],
    ) -> np.ndarray:
        length, height, width = frames.shape[:3]
        masks = np.zeros((len(boxes), length, height, width), dtype=bool)
        if len(boxes) == 0:
            return masks
        session = self._session(frames)
        self._add_prompts(session, key, boxes, points, (width, height))
        self.model(session, frame_idx=key)
        for reverse in passes:
            for out in self.model.propagate_in_video_iterator(
                session, start_frame_idx=key, reverse=reverse
            ):
                masks[:, out.frame_idx] = _decide(out.pred_masks, (height, width))
                _drop_unused(session)
                _forget_beyond(session, out.frame_idx, self._reach())
            _forget_tracked(session)
        return masks

    def _session(self, frames: np.ndarray) -> Sam2VideoInferenceSession:
        """Return a session that keeps the video in host memory and copies one frame at a time."""
        session: Any = Sam2VideoInferenceSession(
            video_height=frames.shape[1],
            video_width=frames.shape[2],
            inference_device=self.model.device,
            inference_state_device=self.model.device,
            video_storage_device="cpu",
            dtype=self.model.dtype,
        )
        # Given a video, it would keep every frame as floats: 12 MiB each at SAM2's own size.
        model = self.model
        session.processed_frames = _SessionFrames(
            frames, model.image_size, model.device, model.dtype
        )
        session.cache = _SharedFeatures(self.features, frames)
        return session

    def _reach(self) -> int:
        """Return the maximum number of frames that the model attends back to."""
        return max(self.model.num_maskmem, self.model.config.max_object_pointers_in_encoder)

    def _add_prompts(
        self,
        session: Sam2VideoInferenceSession,
        key: int,
        boxes: np.ndarray,
        points: np.ndarray | None,
        size: tuple[int, int],
    ) -> None:
        """Add the prompts of all objects; a session accepts one set of new prompts per frame."""
        scale = np.array([self.model.image_size / size[0], self.model.image_size / size[1]])
        labels = [BOX_FIRST, BOX_SECOND]
        coordinates = np.reshape(boxes, (-1, 2, 2))
        if points is not None:
            labels.append(POSITIVE)
            coordinates = np.concatenate([coordinates, np.reshape(points, (-1, 1, 2))], axis=1)
        for index, object_coordinates in enumerate(coordinates * scale):
            prompt = {
                "point_coords": torch.tensor(object_coordinates, dtype=torch.float32)[None, None],
                "point_labels": torch.tensor([[labels]], dtype=torch.int32),
            }
            session.add_point_inputs(session.obj_id_to_idx(index + 1), key, prompt)
        session.obj_with_new_inputs = list(range(1, len(boxes) + 1))


def _decide(logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Return bool `[N, H, W]`: mask logits `[N, 1, h, w]`, resized bilinearly, above 0."""
    full = torch.nn.functional.interpolate(
        logits.float(), size=size, mode="bilinear", align_corners=False
    )
    return (full[:, 0] > 0).cpu().numpy()


def _drop_unused(session: Sam2VideoInferenceSession) -> None:
    """Drop full-size logits: transformers keeps 4 MiB per object and frame and never reads them."""
    for per_object in session.output_dict_per_obj.values():
        for kind in ("cond_frame_outputs", "non_cond_frame_outputs"):
            for stored in per_object[kind].values():
                stored.pop("high_res_masks", None)


def _forget_beyond(session: Sam2VideoInferenceSession, frame: int, reach: int) -> None:
    """Drop tracked frames that no later frame of this pass attends to."""
    for per_object in session.output_dict_per_obj.values():
        tracked = per_object["non_cond_frame_outputs"]
        for old in [t for t in tracked if abs(t - frame) >= reach]:
            del tracked[old]


def _forget_tracked(session: Sam2VideoInferenceSession) -> None:
    """Drop tracked frames; the next pass would read this pass's memory of the other side."""
    for index in session.output_dict_per_obj:
        session.output_dict_per_obj[index]["non_cond_frame_outputs"].clear()
        session.frames_tracked_per_obj[index].clear()
