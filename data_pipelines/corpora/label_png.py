"""Label images: PNGs whose pixel values are objects' ids.

Pillow inflates a PNG row by row, which takes longer than decoding the frame beside it. Images as
Pillow itself writes them (8-bit palette or grey, not interlaced, rows without a filter) are
inflated in one go by ISA-L, several times faster. Whatever is not exactly that, or not whole, goes
to Pillow, which reads or refuses it: the result is Pillow's in every case.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
from isal import isal_zlib
from PIL import Image

from data_pipelines.corpora.base import CorpusFault
from data_pipelines.corpora.rle import MAX_PIXELS

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = (b"PLTE", b"tRNS")
"""Chunks that leave indices as they are. Pillow writes no others into a label image."""
_PALETTE, _GREY = 3, 0


@lru_cache(maxsize=8)
def read_labels(path: str) -> np.ndarray:
    """uint8 [H, W]: the palette indices of an annotation PNG. Raises CorpusFault.

    The last few are kept, since a frame's objects are asked for one after the other; the array
    cannot be written into.
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
    """The length and the bytes of each file; of one that cannot be read, a length of -1."""
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
    """uint8 [H, W] of a PNG as Pillow writes label images; None for any other, or a broken one."""
    shape, packed = _parts(data)
    if shape is None:
        return None
    height, width = shape
    rows = height * (width + 1)
    try:
        inflater = isal_zlib.decompressobj()
        raw = inflater.decompress(packed, rows + 1)
    except isal_zlib.error:
        return None
    if len(raw) != rows or not inflater.eof or inflater.unused_data:
        return None
    lines = np.frombuffer(raw, np.uint8).reshape(height, width + 1)
    return None if lines[:, 0].any() else np.ascontiguousarray(lines[:, 1:])


def _parts(data: bytes) -> tuple[tuple[int, int] | None, bytes]:
    """((H, W), zlib stream); None for what is not plain. Checksums are those that Pillow checks."""
    other = None, b""
    if not data.startswith(_SIGNATURE):
        return other
    at, shape, packed, ended = len(_SIGNATURE), None, [], False
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
    """(H, W) of a header whose image may be plain."""
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
