"""Index of mask_dict.json, which can be larger than memory.

The file is read once, in pieces, and only the position of each annotation is kept; an annotation is
parsed on demand. A file that is not plain ASCII JSON is read whole, and refused if it is invalid.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_pipelines.corpora.json_node import Node, read_json
from rcot_rl.errors import InputError

_PIECE = 1 << 23
"""Bytes read at a time."""
_CACHED = 256
"""Annotations that stay parsed: more than a clip has objects."""
_WHITESPACE = " \t\n\r"
_DECODER = json.JSONDecoder()


class MaskFile:
    """The members of one JSON object. Forked workers can share it: no file stays open."""

    def __init__(self, path: Path) -> None:
        """Index the file; InputError if it is not a JSON object."""
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._cache: OrderedDict[str, Any] = OrderedDict()
        self._whole: dict[str, Any] | None = None
        try:
            with path.open("rb") as file:
                self._places = {name: (start, n) for name, start, n in members(file)}
        except (OSError, ValueError, RecursionError):
            self._whole = Node(read_json(path), path).of(dict)

    def get(self, name: str) -> Any:
        """Return the value of a member, or None; InputError if the file has changed since."""
        if self._whole is not None:
            return self._whole.get(name)
        if name not in self._places:
            return None
        if name not in self._cache:
            self._cache[name] = self._read(*self._places[name])
            if len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        return self._cache[name]

    def digest(self, name: str) -> bytes:
        """Return the sha256 of a member's text; empty if there is no such member."""
        if self._whole is None:
            text = self._bytes(*self._places[name]) if name in self._places else None
        else:
            text = json.dumps(self._whole[name]).encode() if name in self._whole else None
        return b"" if text is None else hashlib.sha256(text).digest()

    def _read(self, start: int, length: int) -> Any:
        try:
            return json.loads(self._bytes(start, length))
        except ValueError as error:
            raise InputError(f"changed during reading: {error}", file=self.path) from error

    def _bytes(self, start: int, length: int) -> bytes:
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                return os.pread(file, length, start)
            finally:
                os.close(file)
        except OSError as error:
            raise InputError(f"changed during reading: {error}", file=self.path) from error


def members(file: BinaryIO, piece: int = _PIECE) -> Iterator[tuple[str, int, int]]:
    """Yield (name, first byte, bytes of the value) of every member of the JSON object in `file`.

    Holds at most a few pieces of `piece` bytes, or the longest member, in memory.
    Raises ValueError.
    """
    text, base, at = file.read(piece).decode("ascii"), 0, 0
    opened = False
    while True:
        member = _member(text, at, opened)
        if member is None:
            data = file.read(piece)
            if not data:
                raise ValueError("the object does not end")
            text, base, at = text[at:] + data.decode("ascii"), base + at, 0
            continue
        name, start, end, at, closed = member
        if name is not None:
            yield name, base + start, end - start
        opened = True
        if closed:
            break
    if (text[at:] + file.read().decode("ascii")).strip(_WHITESPACE):
        raise ValueError("more than one value")


def _member(text: str, at: int, opened: bool) -> tuple[str | None, int, int, int, bool] | None:
    """Parse the member at `at`, after the opening brace or a comma.

    Returns:
        (name, start and end of the value, next position, True if the object ends there). The name
        is None if the object is empty. None if `text` ends too early or is not JSON.
    """
    try:
        if not opened:
            at = _after(text, at, "{")
            if text[_skip_whitespace(text, at)] == "}":
                return None, 0, 0, _skip_whitespace(text, at) + 1, True
        name, at = _DECODER.raw_decode(text, _skip_whitespace(text, at))
        if not isinstance(name, str):
            return None
        start = _skip_whitespace(text, _after(text, at, ":"))
        _, end = _DECODER.raw_decode(text, start)
        at = _skip_whitespace(text, end)
        if text[at] not in ",}":
            return None
        return name, start, end, at + 1, text[at] == "}"
    except (IndexError, ValueError):
        return None


def _skip_whitespace(text: str, at: int) -> int:
    while text[at] in _WHITESPACE:
        at += 1
    return at


def _after(text: str, at: int, character: str) -> int:
    at = _skip_whitespace(text, at)
    if text[at] != character:
        raise ValueError(f"no {character}")
    return at + 1
