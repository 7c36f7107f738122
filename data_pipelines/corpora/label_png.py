"""Read label images: PNGs whose pixel values are object ids.

Pillow inflates a PNG row by row, which takes longer than decoding the frame beside it. Images as
Pillow writes them (8-bit palette or grey, not interlaced, unfiltered rows) are inflated in one go
by ISA-L, several times faster. All others, and damaged ones, go to Pillow, which reads or refuses
them: the result is always Pillow's.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import cast

import numpy as np
from isal import isal_zlib
from PIL import Image

from data_pipelines.corpora.corpus import CorpusFault
from data_pipelines.corpora.rle import MAX_PIXELS

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = (b"PLTE", b"tRNS")
"""Chunks that do not change the indices. Pillow writes no others into a label image."""
_PALETTE, _GREY = 3, 0
_INFLATE_ERROR = cast(type[Exception], isal_zlib.error)  # its stub declares an instance


@lru_cache(maxsize=8)
def read_labels(path: str) -> np.ndarray:
    """Return the palette indices of an annotation PNG: uint8 [H, W], read-only.

    The last few images are cached, because a frame's objects are read one after the other.
    Raises CorpusFault.
    """
    try:
        labels = plain_labels(_read(path))
    except FileNotFoundError as error:
        raise CorpusFault("missing_mask", path) from error
    except (OSError, ValueError) as error:
        raise CorpusFault("unreadable_mask", path, str(error)) from error
    if labels is None:
        labels = _by_pillow(path)
    labels.flags.writeable = False
    return labels


def file_bytes(paths: Iterable[str]) -> Iterator[bytes]:
    """Yield the length and the bytes of each file; a length of -1 if it cannot be read."""
    for path in paths:
        try:
            data = _read(path)
        except OSError:
            yield struct.pack(">q", -1)
        else:
            yield struct.pack(">q", len(data)) + data


def _read(path: str) -> bytes:
    # not pathlib: half a million such files are read
    with open(path, "rb") as file:
        return file.read()


def plain_labels(data: bytes) -> np.ndarray | None:
    """Decode a PNG as Pillow writes label images to uint8 [H, W]; None for all others."""
    shape, packed = _parts(data)
    if shape is None:
        return None
    height, width = shape
    rows = height * (width + 1)
    try:
        inflater = isal_zlib.decompressobj()
        raw = inflater.decompress(packed, rows + 1)
    except _INFLATE_ERROR:
        return None
    if len(raw) != rows or not inflater.eof or inflater.unused_data:
        return None
    lines = np.frombuffer(raw, np.uint8).reshape(height, width + 1)
    return None if lines[:, 0].any() else np.ascontiguousarray(lines[:, 1:])


def _parts(data: bytes) -> tuple[tuple[int, int] | None, bytes]:
    """Return ((H, W), zlib stream) of a plain label image, checksums verified, or (None, b"")."""
    other = None, b""
    if not data.startswith(_SIGNATURE):
        return other
    at, ended = len(_SIGNATURE), False
    shape: tuple[int, int] | None = None
    packed: list[bytes] = []
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body, at = data[at + 8 : at + 8 + length], at + 12 + length
        if at > len(data):
            return other
        if kind == b"IDAT" and shape is not None:
            packed.append(body)
            continue
        (checksum,) = struct.unpack_from(">I", data, at - 4)
        if zlib.crc32(kind + body) != checksum:
            return other
        if kind == b"IEND":
            ended = True
            break
        if kind == b"IHDR" and shape is None:
            shape = _plain_shape(body)
            if shape is None:
                return other
        elif kind not in _COLOURS or packed:
            return other
    return (shape, b"".join(packed)) if ended else other


def _plain_shape(header: bytes) -> tuple[int, int] | None:
    """Return (H, W) from the header of an image that can be plain; None for others."""
    if len(header) != 13:
        return None
    width, height, *rest = struct.unpack(">IIBBBBB", header)
    plain = rest in ([8, _PALETTE, 0, 0, 0], [8, _GREY, 0, 0, 0])
    return (height, width) if plain and 0 < width * height <= MAX_PIXELS else None


def _by_pillow(path: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise CorpusFault("unreadable_mask", path, f"{image.size} is too large")
            if image.mode not in ("P", "L", "1"):
                raise CorpusFault("not_a_palette_png", path, f"mode {image.mode}")
            return np.array(image, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CorpusFault("unreadable_mask", path, str(error)) from error
