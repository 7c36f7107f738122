"""Every response of a model, on disk as soon as it is there: what was answered is not asked again.

A ledger is a JSONL file that grows in the order in which answers come. Its first line says what was
asked of whom; another model, prompt or seed does not go on with it. A kill can leave half a line at
the end, which is cut off when the ledger is opened again. The final file is written from it in an
order of the caller's, so that it does not depend on scheduling or on interruptions.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rcot_rl.errors import InputError


class Ledger:
    """Records by key. A context manager: one process at a time writes it."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Open or begin the ledger. identity: JSON values that decide the answers.

        Raises InputError for a ledger of another identity, for a broken line that is not the last
        one, and while another process holds it.
        """
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise InputError("another command is asking into this file", file=path) from error
        self._file.seek(0)
        text = self._file.read()
        whole = text.rfind(b"\n") + 1
        try:
            self._read(text[:whole].decode("utf-8", "replace"), dict(identity))
        except InputError:
            self._file.close()
            raise
        self._file.truncate(whole)
        self._file.seek(whole)
        if whole == 0:
            self._write({"ledger": dict(identity)})

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Note an answer; it is on its way to the disk when this returns."""
        if key in self.records:
            raise ValueError(f"{key} is in the ledger already")
        self._write({"key": key, **record})
        self.records[key] = dict(record)

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
                self._check(record.get("ledger"), identity)
                continue
            key = record.pop("key", None)
            if not isinstance(key, str):
                raise InputError("missing, or not a string", file=self.path, line=number, key="key")
            self.records[key] = record

    def _check(self, found: Any, identity: dict[str, Any]) -> None:
        if not isinstance(found, dict):
            raise InputError("is not a ledger of answers", file=self.path, line=1)
        for name in identity.keys() | found.keys():
            if found.get(name) != identity.get(name):
                raise InputError(
                    f"was begun with {name} = {found.get(name)!r}, not {identity.get(name)!r}: "
                    "give another folder, or remove this file",
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
    """A JSONL file, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8", errors="replace") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    part.replace(path)
