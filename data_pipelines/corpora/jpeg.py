"""Read the size of a JPEG and check that it is complete, without decoding it.

The scan does this for every frame of every video. Decoders silently fill the missing part of a
truncated file with grey, so the end-of-image marker is checked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

_HEAD = 16384
_TAIL = 4096
_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
"""Markers of frame headers; the excluded ones are tables."""

JpegFaultReason = Literal["unreadable_frame", "truncated_frame"]


class JpegFault(ValueError):
    """The file is not a complete JPEG."""

    def __init__(self, reason: JpegFaultReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def size_of(path: Path | str) -> tuple[int, int]:
    """Return (H, W) as stored, without applying an EXIF rotation.

    Raises:
        JpegFault: The file is not a complete JPEG.
        OSError: The file cannot be read.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        head = os.pread(file, _HEAD, 0)
        length = os.fstat(file).st_size
        if head[:2] != b"\xff\xd8":
            raise JpegFault("unreadable_frame", "not a JPEG" if length else "an empty file")
        tail = head[-_TAIL:]
        if length > len(head):
            tail = os.pread(file, _TAIL, length - _TAIL)
        size = _size(head)
        if size is None:
            # the metadata before the frame header is large
            size = _size(os.pread(file, length, 0))
    finally:
        os.close(file)
    if size is None:
        raise JpegFault("truncated_frame", "the file ends before its image begins")
    if b"\xff\xd9" not in tail:
        raise JpegFault("truncated_frame", "the file ends before its image does")
    if 0 in size:
        raise JpegFault("unreadable_frame", f"an image of {size[0]} x {size[1]} pixels")
    return size


def _size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            raise JpegFault("unreadable_frame", "no marker where one must be")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _FRAME_HEADERS:
            return int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
            continue
        if marker in (0xD9, 0xDA):
            raise JpegFault("unreadable_frame", "no frame header before the image")
        at += 2 + max(int.from_bytes(data[at + 2 : at + 4]), 2)
    return None
