"""SAM2 segmentation: the keyframe's boxes and points, propagated both ways (paper, eq. 6).

The model is transformers' `Sam2VideoModel` with its own inference session, for released weights and
the shipped tiny ones alike. Its processor is not used: it needs the whole video in memory, and does
no more than `preprocess` and `_decide` below. Objects are tracked independently, so their masks may
overlap, as in the original. Memory does not grow with the clip: frames are read on request, image
features are kept up to a limit, and an object's memory up to the number of frames that the model
attends to. Not implemented: prompts on several frames.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from rcot_rl.errors import InputError
from rcot_rl.recipe.inference_section import SegmenterSection
from rcot_rl.segmentation.clip_frames import FrameSequence, frame_digest
from rcot_rl.segmentation.original_sam2 import read_original
from rcot_rl.segmentation.segmenter import FrameMasks, no_masks, visiting_order

logger = logging.getLogger(__name__)

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
BOX_FIRST, BOX_SECOND, POSITIVE = 2, 3, 1  # SAM's prompt labels; a box's corners come first


GPU_BATCH = 4
"""Default of `segmenter.frames_per_batch` on a GPU."""


def preprocess(
    frames_thwc: np.ndarray, side: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Resize and normalize frames for SAM2, which was trained without keeping the aspect ratio.

    All work is done on `device`, in float32. The result is that of SAM2's own processor before it
    rounds the resized image to integers; that rounding differs between devices.

    Args:
        frames_thwc: uint8 `[T, H, W, 3]` RGB.

    Returns:
        float32 `[T, 3, side, side]`, normalized with ImageNet's mean and standard deviation.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frames_thwc)).to(device)
    resized = torch.nn.functional.interpolate(
        pixels.permute(0, 3, 1, 2).float(),
        size=(side, side),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    return resized.contiguous().div_(255.0).sub_(mean).div_(std)


class FeatureStore:
    """An LRU cache of image features by the frame's content.

    Several queries about one video, and both passes of each, share a frame's features: with few
    objects, most of SAM2's work is the image encoder.
    """

    def __init__(self, most_bytes: int) -> None:
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

    def __contains__(self, key: bytes) -> bool:
        """Return True if the store has features, without counting this as a use of them."""
        return key in self._kept

    def room(self) -> int:
        """Return how many frames fit, at least 1; 1 as long as their size is unknown."""
        size = next((size for size, _ in self._kept.values()), self.most_bytes)
        return max(1, self.most_bytes // max(size, 1))


class _SessionFeatures:
    """A session's cache of image features: encodes frames that the store does not have."""

    def __init__(self, segmenter: Sam2Segmenter, frames: FrameSequence, key: int) -> None:
        self._segmenter, self._frames = segmenter, frames
        self._order = visiting_order(len(frames), key)
        self._position = {t: index for index, t in enumerate(self._order)}
        self._digests: dict[int, bytes] = {}

    def get_vision_features(self, frame_idx: int) -> dict[str, Any]:
        """Return the features of a frame."""
        features = self._segmenter.features.get(self._digest(frame_idx))
        return self._encode(frame_idx) if features is None else features

    def _encode(self, t: int) -> dict[str, Any]:
        """Encode frame `t` together with frames that are needed after it, and return its features.

        A frame after it that cannot be read is reported when its turn comes.
        """
        store = self._segmenter.features
        images = {self._digest(t): self._frames[t]}
        start = self._position[t] + 1
        for upcoming in self._order[start : start + self._segmenter.batch_size(store) - 1]:
            try:
                digest = self._digest(upcoming)
                if digest not in store and digest not in images:
                    images[digest] = self._frames[upcoming]
            except InputError:
                break
        encoded = self._segmenter.encode(np.stack(list(images.values())))
        for digest, features in reversed(list(zip(images, encoded, strict=True))):
            store.put(digest, features)  # that of `t` last, so that it stays
        return encoded[0]

    def _digest(self, t: int) -> bytes:
        if t not in self._digests:
            self._digests[t] = frame_digest(self._frames, t)
        return self._digests[t]


class Sam2Segmenter:
    """SAM2 from a folder of transformers, a checkpoint of the original SAM2, or a hub id."""

    def __init__(
        self, model: Sam2VideoModel, name: str, settings: SegmenterSection | None = None
    ) -> None:
        self.model = model.eval()
        self.name = name
        self.settings = settings or SegmenterSection()
        self.features = FeatureStore(self.settings.feature_bytes)
        self._positions: torch.Tensor | None = None

    @cached_property
    def identity(self) -> str:
        """Digest of the weights and of all else that the masks depend on."""
        config = self.model.config.to_dict()
        config.pop("_name_or_path", None)
        rest = {
            "config": config,
            "device": self.model.device.type,
            "dtype": str(self.model.dtype),
            "compile": self.settings.compile,
            "frames_per_batch": self._frames_per_batch(),
            "versions": [torch.__version__, transformers.__version__],
        }
        digest = hashlib.blake2b(json.dumps(rest, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            values = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy().data)
        return f"sam2 {digest.hexdigest()}"

    @classmethod
    def load(
        cls, source: str | Path, device: str = "cpu", settings: SegmenterSection | None = None
    ) -> Sam2Segmenter:
        """Load a model. Raises InputError.

        Args:
            source: Folder, checkpoint file of the original SAM2, or hub id.
        """
        settings = settings or SegmenterSection()
        dtype = settings.dtype
        if dtype == "auto":
            dtype = "float32" if torch.device(device).type == "cpu" else "bfloat16"
        from_pretrained: Any = Sam2VideoModel.from_pretrained
        given: dict[str, Any] = {"pretrained_model_name_or_path": str(source)}
        if Path(source).is_file():
            config, weights = read_original(Path(source))
            given = {
                "pretrained_model_name_or_path": None,
                "config": config,
                "state_dict": weights,
            }
        try:
            model, loading_info = from_pretrained(
                **given, dtype=getattr(torch, dtype), output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            message = f"cannot be loaded as a SAM2 video model: {reason}"
            raise InputError(message, file=source) from error
        # transformers would initialise missing weights randomly, leave out others, and continue
        missing = sorted(loading_info["missing_keys"])
        unknown = sorted(set(given.get("state_dict", ())) - set(model.state_dict()))
        for fault, names in (("lacks", missing), ("has unknown", unknown)):
            if names:
                message = f"{fault} weights of a SAM2 video model, {len(names)} in all"
                raise InputError(message, file=source, key=names[0])
        name = f"sam2:{Path(source).name}"
        segmenter = cls(
            model.to(device), name if dtype == "float32" else f"{name} ({dtype})", settings
        )
        if settings.compile:
            segmenter._compile()
        logger.info(
            "segmenter: SAM2 from %s on %s in %s%s; %d frames per batch, features up to %d MiB",
            source,
            device,
            dtype,
            ", compiled" if settings.compile else "",
            segmenter._frames_per_batch(),
            settings.feature_bytes >> 20,
        )
        return segmenter

    def _compile(self) -> None:
        """Compile for the device, now rather than during the first clip. Raises InputError."""
        # not the neck: if compiled, its position encoding becomes float32
        self.model.vision_encoder.backbone.compile()
        self.model.memory_attention.compile(dynamic=True)  # the memory grows with each frame
        frames = np.zeros((3, 64, 64, 3), np.uint8)
        frames[:] = np.arange(3, dtype=np.uint8)[:, None, None, None]
        try:
            for _ in self.segment(frames, 1, np.array([[8.0, 8.0, 32.0, 32.0]]), None):
                pass
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"torch.compile failed: {reason}", key="segmenter.compile") from error
        self.features = FeatureStore(self.settings.feature_bytes)

    def _frames_per_batch(self) -> int:
        on_cpu = self.model.device.type == "cpu"
        return self.settings.frames_per_batch or (1 if on_cpu else GPU_BATCH)

    def batch_size(self, store: FeatureStore) -> int:
        """Return how many frames to encode at once; not more than `store` can keep."""
        return min(self._frames_per_batch(), store.room())

    @torch.inference_mode()
    def encode(self, frames_thwc: np.ndarray) -> list[dict[str, Any]]:
        """Return image features as the session caches them, one dictionary per frame.

        Args:
            frames_thwc: uint8 `[T, H, W, 3]` RGB.
        """
        model: Any = self.model
        pixels = preprocess(frames_thwc, model.image_size, model.device).to(model.dtype)
        vision = model.get_image_features(pixels, return_dict=True)
        if self._positions is None:
            # Equal for all frames. The model reads only the coarsest level; all of them would be
            # 44 MiB per frame in SAM2-large.
            self._positions = vision.fpn_position_encoding[-1][:, :1].clone()
        # copies, so that a frame's features can be freed without those of its batch
        return [
            {
                "vision_feats": [level[:, t : t + 1].clone() for level in vision.fpn_hidden_states],
                "vision_pos_embeds": [self._positions],
            }
            for t in range(len(frames_thwc))
        ]

    def segment(
        self,
        frames: FrameSequence,
        key: int,
        boxes_source: np.ndarray,
        points_source: np.ndarray | None,
    ) -> Iterator[FrameMasks]:
        """Yield masks; arguments and order as in `VideoSegmenter.segment`.

        Propagates forward, then backward. Each pass sees only the keyframe and its own side, so the
        order of the passes does not matter.
        """
        return self._segment(frames, key, boxes_source, points_source, (False, True))

    @torch.no_grad()
    def _segment(
        self,
        frames: FrameSequence,
        key: int,
        boxes: np.ndarray,
        points: np.ndarray | None,
        passes: tuple[bool, ...],
    ) -> Iterator[FrameMasks]:
        if len(boxes) == 0:
            yield from no_masks(frames, key)
            return
        height, width = frames[key].shape[:2]
        session = self._session(frames, key)
        self._add_prompts(session, key, boxes, points, (width, height))
        prompted = self.model(session, frame_idx=key)
        yield key, _decide(prompted.pred_masks, (height, width))
        for reverse in passes:
            for out in self.model.propagate_in_video_iterator(
                session, start_frame_idx=key, reverse=reverse
            ):
                _drop_unused(session)
                _forget_beyond(session, out.frame_idx, self._reach())
                if out.frame_idx != key:  # both passes begin with it
                    yield out.frame_idx, _decide(out.pred_masks, (height, width))
            _forget_tracked(session)

    def _session(self, frames: FrameSequence, key: int) -> Sam2VideoInferenceSession:
        """Return a session for prompts in frame `key`, which gets features and never pixels."""
        session: Any = Sam2VideoInferenceSession(
            inference_device=self.model.device,
            inference_state_device=self.model.device,
            video_storage_device="cpu",
            dtype=self.model.dtype,
        )
        session.processed_frames = range(len(frames))  # only its length is used
        session.cache = _SessionFeatures(self, frames, key)
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
