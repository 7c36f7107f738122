"""mask_dict.json, which is larger than memory should be: where each annotation lies in the file.

The file is read through once, in pieces, and its members' places are kept instead of their masks;
an annotation is parsed when it is asked for. A file that is not plain ASCII JSON is read whole, and
refused as every other document is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_pipelines.corpora.metadata import Node, read_json
from rcot_rl.errors import InputError

_PIECE = 1 << 23
_KEPT = 256
"""Annotations that stay parsed: more than a clip has objects."""
_WHITE = " \t\n\r"
_DECODER = json.JSONDecoder()


class MaskFile:
    """The members of one file. Workers may share it: nothing is open between reads."""

    def __init__(self, path: Path) -> None:
        """Raises InputError for what is not a JSON object."""
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._whole: dict[str, Any] | None = None
        try:
            with path.open("rb") as file:
                self._places = {name: (start, n) for name, start, n in members(file)}
        except (OSError, ValueError, RecursionError):
            self._whole = Node(read_json(path), path).of(dict)

    def get(self, name: str) -> Any:
        """The value of a member; None when there is none. Raises InputError for a file that was
        changed since."""
        if self._whole is not None:
            return self._whole.get(name)
        if name not in self._places:
            return None
        if name not in self._kept:
            self._kept[name] = self._read(*self._places[name])
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[name]

    def digest(self, name: str) -> bytes:
        """Sha256 of a member, as it is written; empty when there is none."""
        if self._whole is None:
            found = self._bytes(*self._places[name]) if name in self._places else None
        else:
            found = json.dumps(self._whole[name]).encode() if name in self._whole else None
        return b"" if found is None else hashlib.sha256(found).digest()

    def _read(self, start: int, length: int) -> Any:
        try:
            return json.loads(self._bytes(start, length))
        except ValueError as error:
            raise InputError(f"changed while it was read: {error}", file=self.path) from error

    def _bytes(self, start: int, length: int) -> bytes:
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                return os.pread(file, length, start)
            finally:
                os.close(file)
        except OSError as error:
            raise InputError(f"changed while it was read: {error}", file=self.path) from error


def members(file: BinaryIO, piece: int = _PIECE) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, bytes of the value) of every member of the JSON object in `file`.

    Never more than a few pieces of `piece` bytes, or the longest member, are in memory. Raises
    ValueError for what is not ASCII or not one object.
    """
    text, base, at = file.read(piece).decode("ascii"), 0, 0
    opened = False
    while True:
        found = _member(text, at, opened)
        if found is None:
            data = file.read(piece)
            if not data:
                raise ValueError("the object does not end")
            text, base, at = text[at:] + data.decode("ascii"), base + at, 0
            continue
        name, start, end, at, closed = found
        if name is not None:
            yield name, base + start, end - start
        opened = True
        if closed:
            break
    if (text[at:] + file.read().decode("ascii")).strip(_WHITE):
        raise ValueError("more than one value")


def _member(text: str, at: int, opened: bool) -> tuple[str | None, int, int, int, bool] | None:
    """(name, start, end of the value, where to go on, whether the object ends there) of the member
    at `at`, behind the opening brace or a comma; name None: the object is empty. None: `text` ends
    before that is known, or is not JSON."""
    try:
        if not opened:
            at = _past(text, at, "{")
            if text[_blank(text, at)] == "}":
                return None, 0, 0, _blank(text, at) + 1, True
        name, at = _DECODER.raw_decode(text, _blank(text, at))
        if not isinstance(name, str):
            return None
        start = _blank(text, _past(text, at, ":"))
        _, end = _DECODER.raw_decode(text, start)
        at = _blank(text, end)
        if text[at] not in ",}":
            return None
        return name, start, end, at + 1, text[at] == "}"
    except (IndexError, ValueError):
        return None


def _blank(text: str, at: int) -> int:
    while text[at] in _WHITE:
        at += 1
    return at


def _past(text: str, at: int, character: str) -> int:
    at = _blank(text, at)
    if text[at] != character:
        raise ValueError(f"no {character}")
    return at + 1
