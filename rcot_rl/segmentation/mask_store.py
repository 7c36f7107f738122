"""Masks on disk, found by what they depend on: segmenter, frames, keyframe and prompts.

Checkpoints, variants and rewards of a run often prompt the segmenter with the same boxes in the
same keyframe. The masks are then made once: an entry holds the union of the objects as one PNG per
frame, and the seconds that it took to make them.

Several processes may use one folder. An entry is written in one step, and its content is checked
when it is read, so a process that is killed leaves no wrong masks. The entries that were not used
for the longest time are removed when the folder exceeds its limit; processes look at the folder
each time they have written a twentieth of the limit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from rcot_rl.recipe.inference_section import SegmenterSection
from rcot_rl.segmentation.clip_frames import FrameSequence, files_digest
from rcot_rl.segmentation.segmenter import VideoSegmenter

logger = logging.getLogger(__name__)

SUFFIX = ".masks"
MASK_RULES = 1
"""Raise it when a change of this package changes masks."""

ABANDONED_S = 3600.0
"""Age from which a temporary file belongs to a process that was killed."""

_DIGEST_SIZE = 16
_CHECKS_PER_LIMIT = 20
_LEFT_AFTER_REMOVAL = 0.9
"""Share of the limit that is left when entries are removed."""


@dataclass(frozen=True)
class StoredMasks:
    """The masks of one prompted clip."""

    pngs: tuple[bytes, ...]
    """The union of the objects in each frame: PNG, single channel, 0 or 255."""
    size: tuple[int, int]
    """(H, W) of the frames."""
    seconds: float
    """Time in which the masks were made."""


def encode_mask(mask: np.ndarray) -> bytes:
    """Return a bool `[H, W]` mask as PNG, single channel, 0 or 255."""
    encoded, png = cv2.imencode(".png", mask.astype(np.uint8) * 255)
    if not encoded:
        raise RuntimeError("OpenCV could not encode a mask")
    return png.tobytes()


def decode_mask(png: bytes) -> np.ndarray:
    """Return bool `[H, W]`; the opposite of `encode_mask`."""
    mask = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise RuntimeError("OpenCV could not decode a mask")
    return mask > 0


def masks_key(
    segmenter: VideoSegmenter,
    frames: FrameSequence,
    key: int,
    boxes_source: np.ndarray,
    points_source: np.ndarray,
) -> str | None:
    """Return the name of the masks that `segmenter` makes of these prompts.

    Args:
        key: Index of the prompted frame.
        boxes_source: float `[N, 4]`, points_source: float `[N, 2]`, in source pixels.

    Returns:
        32 hex digits; None if the masks cannot be kept: the segmenter has no identity, or the files
        of the frames are unknown or cannot be read.
    """
    identity: str | None = getattr(segmenter, "identity", None)
    clip = files_digest(frames)
    if identity is None or clip is None:
        return None
    text = f"{MASK_RULES} {identity}\0"
    digest = hashlib.blake2b(text.encode() + clip, digest_size=_DIGEST_SIZE)
    for values in ([len(frames), key, len(boxes_source)], boxes_source, points_source):
        digest.update(np.asarray(values, dtype="<f8").tobytes())
    return digest.hexdigest()


def mask_store(folder: Path | None, settings: SegmenterSection) -> MaskStore | None:
    """Return the store in `folder`; None without one, or if `segmenter.mask_bytes` is 0."""
    if folder is None or not settings.mask_bytes:
        return None
    return MaskStore(folder, settings.mask_bytes)


class MaskStore:
    """A folder of masks."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Write nothing yet.

        Args:
            folder: Used by this store only; created with the first entry.
            most_bytes: Limit of the entries' total size.
        """
        self.folder, self.most_bytes = folder, most_bytes
        self._unchecked = most_bytes  # the folder may have entries of an earlier process
        self._names = itertools.count()

    def get(self, key: str | None) -> StoredMasks | None:
        """Return an entry; None without a key or an entry, or if its content is damaged."""
        if key is None:
            return None
        file = self._file(key)
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return None
        masks = _unpacked(data)
        try:
            if masks is None:
                logger.warning("%s: damaged, removed; its masks are made again", file)
                file.unlink()
            else:
                os.utime(file)
        except FileNotFoundError:  # another process has removed it
            pass
        return masks

    def put(self, key: str | None, masks: StoredMasks) -> None:
        """Write an entry, unless it has no key or alone exceeds the limit."""
        if key is None:
            return
        data = _packed(masks)
        if len(data) > self.most_bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{key}-{os.getpid()}-{next(self._names)}"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, self._file(key))
        finally:
            temporary.unlink(missing_ok=True)
        self._unchecked += len(data)
        if self._unchecked * _CHECKS_PER_LIMIT > self.most_bytes:
            self._remove_surplus()
            self._unchecked = 0

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _remove_surplus(self) -> None:
        """Remove abandoned temporary files, and the oldest entries beyond the limit."""
        entries: list[tuple[float, int, str]] = []
        with os.scandir(self.folder) as found:
            for entry in found:
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                if entry.name.endswith(SUFFIX):
                    entries.append((status.st_mtime, status.st_size, entry.path))
                elif time.time() - status.st_mtime > ABANDONED_S:
                    Path(entry.path).unlink(missing_ok=True)
        total = sum(size for _, size, _ in entries)
        if total <= self.most_bytes:
            return
        for _, size, path in sorted(entries):
            if total <= self.most_bytes * _LEFT_AFTER_REMOVAL:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


def _packed(masks: StoredMasks) -> bytes:
    """Return the digest of all that follows, a line of JSON, and the PNGs."""
    header = {
        "size": masks.size,
        "seconds": masks.seconds,
        "lengths": [len(png) for png in masks.pngs],
    }
    content = json.dumps(header).encode() + b"\n" + b"".join(masks.pngs)
    return _digest(content) + content


def _unpacked(data: bytes) -> StoredMasks | None:
    """Return the masks of `_packed`; None if bytes are missing or differ."""
    content = data[_DIGEST_SIZE:]
    if data[:_DIGEST_SIZE] != _digest(content):
        return None
    start = content.index(b"\n") + 1
    header = json.loads(content[:start])
    ends = itertools.accumulate(header["lengths"], initial=start)
    pngs = tuple(content[first:last] for first, last in itertools.pairwise(ends))
    height, width = header["size"]
    return StoredMasks(pngs, (height, width), header["seconds"])


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_SIZE).digest()
