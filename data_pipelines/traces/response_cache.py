"""Cache of a model's responses on disk: no prompt is sent twice.

The cache is a JSONL file that grows in the order in which responses arrive. Its first line is the
identity of the requests; a cache of another model, prompt or seed is refused. A kill can leave half
a line at the end, which is removed when the cache is opened again. The final file is written from
the cache in the caller's order, so it does not depend on scheduling or interruptions.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from rcot_rl.errors import InputError

_IDENTITY = "ledger"
"""Key of the first line; the name that the format has had from its start."""


class ResponseCache:
    """Records by key. A context manager; one process at a time can open a file."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Open or create the cache. Raises InputError.

        Args:
            identity: JSON values that determine the responses.
        """
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise InputError("another command is writing this file", file=path) from error
        self._file.seek(0)
        text = self._file.read()
        complete = text.rfind(b"\n") + 1
        try:
            self._read(text[:complete].decode("utf-8", "replace"), dict(identity))
        except InputError:
            self._file.close()
            raise
        self._file.truncate(complete)
        self._file.seek(complete)
        if complete == 0:
            self._write({_IDENTITY: dict(identity)})

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Store a response; it is handed to the operating system before this returns."""
        if key in self.records:
            raise ValueError(f"{key} is already in the cache")
        self._write({"key": key, **record})
        self.records[key] = dict(record)

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()

    def _read(self, text: str, identity: dict[str, Any]) -> None:
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            record = _record(line, self.path, number)
            if number == 1:
                self._check(record.get(_IDENTITY), identity)
                continue
            key = record.pop("key", None)
            if not isinstance(key, str):
                raise InputError("missing, or not a string", file=self.path, line=number, key="key")
            self.records[key] = record

    def _check(self, stored: Any, identity: dict[str, Any]) -> None:
        if not isinstance(stored, dict):
            raise InputError("is not a response cache", file=self.path, line=1)
        for name in identity.keys() | stored.keys():
            if stored.get(name) != identity.get(name):
                raise InputError(
                    f"was created with {name} = {stored.get(name)!r}, not {identity.get(name)!r}; "
                    "choose another folder, or remove this file",
                    file=self.path,
                    line=1,
                )


def _record(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError("not valid JSON", file=path, line=number) from error
    if not isinstance(record, dict):
        raise InputError("must be an object", file=path, line=number)
    return record


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file atomically."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8", errors="replace") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    part.replace(path)
