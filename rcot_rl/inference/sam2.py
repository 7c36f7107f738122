"""Masks by SAM2 (eq. 6 of the paper: the key frame's boxes and points, propagated both ways).

The model is transformers' `Sam2VideoModel` with its own inference session; released SAM2 weights
and the shipped tiny ones go the same way. Its processor needs torchvision and does no more than
`preprocess` and `_decide` below, so it is not used. Objects are tracked independently of one
another: their masks may overlap, as in the original. Memory does not grow with the clip: frames
wait as bytes, image features are kept up to a limit, and what is remembered of an object is bounded
by the model's own reach. Left out: prompts on several frames.
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
"""Most bytes of image features that are kept on the model's device: 8 MiB a frame in bf16 for
SAM2.1-large, so that all queries of a video of 250 frames share them."""


def preprocess(
    frames_thwc: np.ndarray, side: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Resize and normalize frames for SAM2, which was trained without keeping the aspect ratio.

    Frames are resized on the host and normalized on `device`, so that bytes travel, not floats.

    Args:
        frames_thwc: uint8 [T, H, W, 3] RGB.
        side: the model's image size in pixels.
        device: where the result lies.

    Returns:
        float32 [T, 3, side, side], normalized with ImageNet's mean and standard deviation.
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


class _Pixels(Mapping[int, torch.Tensor]):
    """A session's video. Each frame is prepared when it is requested: 1 byte a value, not 4."""

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
    """Image features by the content of their frame, the least recently used dropped first.

    Several queries about one video, and the two passes of each, share a frame's features: SAM2's
    image encoder is most of its work for few objects.
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
        # position encodings are the same tensors for every frame: they cost nothing more
        size = sum(t.numel() * t.element_size() for t in features["vision_feats"])
        self._kept[key] = (size, features)
        self.bytes += size
        while self.bytes > self.most_bytes and len(self._kept) > 1:
            self.bytes -= self._kept.popitem(last=False)[1][0]


class _SharedFeatures:
    """What a session takes for its cache of vision features: a view of the store by frame index."""

    def __init__(self, store: FeatureStore, frames_thwc: np.ndarray) -> None:
        self._store, self._frames = store, frames_thwc
        self._digests: dict[int, bytes] = {}

    def cache_vision_features(self, frame_idx: int, features: dict[str, Any]) -> None:
        self._store.put(self._digest(frame_idx), features)

    def get_vision_features(self, frame_idx: int) -> dict[str, Any] | None:
        return self._store.get(self._digest(frame_idx))

    def clear_all(self) -> None:
        """Part of the session's interface; the store outlives sessions."""

    def _digest(self, t: int) -> bytes:
        if t not in self._digests:
            frame = np.ascontiguousarray(self._frames[t])
            size = np.array(frame.shape).tobytes()
            self._digests[t] = hashlib.blake2b(frame, digest_size=16, salt=size[:16]).digest()
        return self._digests[t]


class Sam2Segmenter:
    """SAM2 from a transformers Sam2Video folder (or a model id that transformers can resolve)."""

    def __init__(self, model: Sam2VideoModel, name: str) -> None:
        self.model = model.eval()
        self.name = name
        self.features = FeatureStore()

    @classmethod
    def load(cls, source: str | Path, device: str = "cpu", dtype: str = "float32") -> Sam2Segmenter:
        """Loads onto `device` in `dtype`, a name of torch's; memory features are bfloat16 anyway.

        Raises InputError when `source` holds no Sam2Video model.
        """
        try:
            model, loaded = Sam2VideoModel.from_pretrained(
                str(source), dtype=getattr(torch, dtype), output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            message = f"cannot be loaded as a SAM2 video model: {first}"
            raise InputError(message, file=source) from error
        # transformers would fill these at random and go on
        missing = sorted(loaded["missing_keys"])
        if missing:
            message = f"lacks {len(missing)} of the weights of a SAM2 video model"
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
        """bool [N, T, H, W]: object n in every frame, from its prompts in frame `key`.

        frames_thwc: uint8 [T, H, W, 3] RGB. boxes_source: [N, 4] x1, y1, x2, y2; points_source:
        [N, 2] x, y, or None; both in source pixels. Forward, then backward: each pass sees only the
        key frame and its own side, so that the order of the passes does not matter.
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
        """The video stays in main memory; only the current frame goes to the model's device."""
        session = Sam2VideoInferenceSession(
            video_height=frames.shape[1],
            video_width=frames.shape[2],
            inference_device=self.model.device,
            inference_state_device=self.model.device,
            video_storage_device="cpu",
            dtype=self.model.dtype,
        )
        # Given a video, it would hold every frame as floats: 12 MiB each at SAM2's own size.
        model = self.model
        session.processed_frames = _Pixels(frames, model.image_size, model.device, model.dtype)
        session.cache = _SharedFeatures(self.features, frames)
        return session

    def _reach(self) -> int:
        """How many frames back the model looks, at most."""
        return max(self.model.num_maskmem, self.model.config.max_object_pointers_in_encoder)

    def _add_prompts(
        self,
        session: Sam2VideoInferenceSession,
        key: int,
        boxes: np.ndarray,
        points: np.ndarray | None,
        size: tuple[int, int],
    ) -> None:
        """All objects at once: the session takes one set of new prompts per frame."""
        scale = np.array([self.model.image_size / size[0], self.model.image_size / size[1]])
        labels = [BOX_FIRST, BOX_SECOND]
        where = np.reshape(boxes, (-1, 2, 2))
        if points is not None:
            labels.append(POSITIVE)
            where = np.concatenate([where, np.reshape(points, (-1, 1, 2))], axis=1)
        for index, spots in enumerate(where * scale):
            prompt = {
                "point_coords": torch.tensor(spots, dtype=torch.float32)[None, None],
                "point_labels": torch.tensor([[labels]], dtype=torch.int32),
            }
            session.add_point_inputs(session.obj_id_to_idx(index + 1), key, prompt)
        session.obj_with_new_inputs = list(range(1, len(boxes) + 1))


def _decide(logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Mask logits [N, 1, h, w] to bool [N, H, W]: bilinear to the source, above 0."""
    full = torch.nn.functional.interpolate(
        logits.float(), size=size, mode="bilinear", align_corners=False
    )
    return (full[:, 0] > 0).cpu().numpy()


def _drop_unused(session: Sam2VideoInferenceSession) -> None:
    """transformers keeps 4 MiB of full-size logits per object and frame and never reads them."""
    for per_object in session.output_dict_per_obj.values():
        for kind in ("cond_frame_outputs", "non_cond_frame_outputs"):
            for stored in per_object[kind].values():
                stored.pop("high_res_masks", None)


def _forget_beyond(session: Sam2VideoInferenceSession, frame: int, reach: int) -> None:
    """Drops tracked frames that no later frame of this pass will look back to."""
    for per_object in session.output_dict_per_obj.values():
        tracked = per_object["non_cond_frame_outputs"]
        for old in [t for t in tracked if abs(t - frame) >= reach]:
            del tracked[old]


def _forget_tracked(session: Sam2VideoInferenceSession) -> None:
    """Else the next pass would read this pass's memory from the key frame's other side."""
    for index in session.output_dict_per_obj:
        session.output_dict_per_obj[index]["non_cond_frame_outputs"].clear()
        session.frames_tracked_per_obj[index].clear()
