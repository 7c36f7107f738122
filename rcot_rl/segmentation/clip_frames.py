"""Frames of a clip, read when a segmenter asks for them: clips may be longer than memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from rcot_rl.errors import InputError

KEPT_FRAMES = 8
"""Number of frames that `ClipFrames` keeps."""


class FrameSequence(Protocol):
    """A clip. A uint8 array `[T, H, W, 3]` is one."""

    def __len__(self) -> int:
        """Return the number of frames."""
        ...

    def __getitem__(self, t: int, /) -> np.ndarray:
        """Return frame `t`, uint8 `[H, W, 3]` RGB. May read it from disk, and raise InputError."""
        ...


class ClipFrames:
    """A `FrameSequence` that reads frames on request and keeps the last `KEPT_FRAMES`."""

    def __init__(
        self, length: int, read: Callable[[int], np.ndarray], file_of: Callable[[int], Path | str]
    ) -> None:
        """Read nothing yet.

        Args:
            length: Number of frames.
            read: Frame index -> uint8 `[H, W, 3]` RGB; always the same for an index.
            file_of: Frame index -> path for messages.
        """
        self._length, self._file_of = length, file_of
        self._read = lru_cache(KEPT_FRAMES)(read)
        self._shape: tuple[int, ...] | None = None
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        """Return the number of frames."""
        return self._length

    def __getitem__(self, t: int, /) -> np.ndarray:
        """Return a frame. Raises InputError if its size differs from that of the first one read."""
        frame = self._read(t)
        self._shape = self._shape or frame.shape
        if frame.shape != self._shape:
            (height, width), (first_height, first_width) = frame.shape[:2], self._shape[:2]
            raise InputError(
                f"has {width} x {height} pixels, and another frame of the clip "
                f"{first_width} x {first_height}",
                file=self._file_of(t),
            )
        return frame

    @cached_property
    def files_digest(self) -> bytes | None:
        """Digest of the bytes of all files; None if one cannot be read. Decodes nothing."""
        digest = hashlib.blake2b(digest_size=16)
        try:
            for t in range(self._length):
                digest.update(hashlib.blake2b(Path(self._file_of(t)).read_bytes()).digest())
        except OSError:
            return None
        return digest.digest()

    def digest(self, t: int) -> bytes:
        """Return the digest of a frame's content; a frame is read for it once."""
        if t not in self._digests:
            self._digests[t] = content_digest(self[t])
        return self._digests[t]


def files_digest(frames: FrameSequence) -> bytes | None:
    """Return the digest of the files of a clip.

    All files are read by one rule (RGB, without EXIF rotation), so that equal files have equal
    pixels.

    Returns:
        16 bytes; None if the clip has no files, or one of them cannot be read.
    """
    return frames.files_digest if isinstance(frames, ClipFrames) else None


def frame_digest(frames: FrameSequence, t: int) -> bytes:
    """Return the digest of the content of frame `t`."""
    return frames.digest(t) if isinstance(frames, ClipFrames) else content_digest(frames[t])


def content_digest(frame: np.ndarray) -> bytes:
    """Return 16 bytes that identify the size and the pixels of a frame."""
    size = np.array(frame.shape).tobytes()
    pixels = np.ascontiguousarray(frame).data
    return hashlib.blake2b(pixels, digest_size=16, salt=size[:16]).digest()
