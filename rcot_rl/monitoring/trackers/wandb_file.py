"""Read the `.wandb` files that wandb writes: its package has no public reader of them.

A file is a header, then blocks of 32 KiB with parts of records, as in LevelDB's log: each part has
a checksum, its length, and whether it is a whole record or its first, middle or last part. A record
is a protobuf message.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER = struct.Struct("<4sHB")
_MAGIC = (b":W&B", 0xBEE1)
_BLOCK = 1 << 15
_PART = struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4


def read_wandb_records(path: Path) -> Iterator[Any]:
    """Yield the `Record` messages of a file, in order, up to its end or its first damaged part."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data = path.read_bytes()
    if len(data) < _HEADER.size or _HEADER.unpack_from(data)[:2] != _MAGIC:
        return
    position, record = _HEADER.size, b""
    while position + _PART.size <= len(data):
        if (left := _BLOCK - position % _BLOCK) < _PART.size:
            position += left
            continue
        checksum, length, kind = _PART.unpack_from(data, position)
        position += _PART.size
        part = data[position : position + length]
        if zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            return
        position += length
        record = part if kind in (_WHOLE, _FIRST) else record + part
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(record)
