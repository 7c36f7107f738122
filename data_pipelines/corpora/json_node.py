"""Read the corpora's JSON files; every invalid value raises InputError with file and key."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

from rcot_rl.errors import InputError

_T = TypeVar("_T")


def read_json(path: Path) -> Any:
    """Return the JSON document at `path`; InputError if it is missing or invalid."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError("no such file", file=path) from error
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON: {error.msg}", file=path, line=error.lineno) from error
    except (OSError, ValueError, RecursionError) as error:
        # ValueError: not UTF-8, or an integer of very many digits
        raise InputError(f"cannot be read: {error}", file=path) from error


class _Repeating(dict[str, Any]):
    """A JSON object in which a key occurs several times."""

    repeated: tuple[str, ...] = ()


def repeated_keys(path: Path) -> list[str]:
    """Return the dotted keys that a JSON file repeats in one object; `read_json` keeps the last."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) == len(pairs):
            return members
        marked = _Repeating(members)
        counts = Counter(key for key, _ in pairs)
        marked.repeated = tuple(key for key, count in counts.items() if count > 1)
        return marked

    def walk(value: Any, key: str) -> Iterator[str]:
        if isinstance(value, _Repeating):
            yield from (f"{key}{name}" for name in value.repeated)
        if isinstance(value, dict):
            for name, member in value.items():
                yield from walk(member, f"{key}{name}.")

    try:
        return list(walk(json.loads(path.read_bytes(), object_pairs_hook=build), ""))
    except (OSError, ValueError, RecursionError):
        return []  # `read_json` reports it


HALF_A_CHARACTER = "contains half of a surrogate pair, which is not a character"


def is_text(text: str) -> bool:
    """Return True if UTF-8 can encode the text: JSON can spell half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


class Node:
    """A value in a JSON document, with its file and dotted key for error messages.

    `node["videos"]["a"].of(str)` returns a string or raises InputError naming the dotted key.
    """

    def __init__(self, value: Any, file: Path, key: str = "") -> None:
        self.value = value
        self.file = file
        self.key = key

    def __getitem__(self, name: str) -> Node:
        mapping = self.of(dict)
        if name not in mapping:
            raise InputError("missing key", file=self.file, key=self._below(name))
        return Node(mapping[name], self.file, self._below(name))

    def __contains__(self, name: str) -> bool:
        return name in self.of(dict)

    def of(self, kind: type[_T]) -> _T:
        """Return the value; InputError if it is not of type `kind`."""
        if not isinstance(self.value, kind) or isinstance(self.value, bool):
            self.refuse(f"must be a {_NAMES.get(kind, kind.__name__)}")
        if isinstance(self.value, str):
            self._must_be_text(self.value)
        return self.value

    def items(self) -> list[tuple[str, Node]]:
        """Return the members of an object, in the file's order."""
        return [(k, Node(v, self.file, self._below(k))) for k, v in self.of(dict).items()]

    def elements(self) -> list[Node]:
        """Return the elements of a list."""
        listed = self.of(list)
        return [Node(v, self.file, f"{self.key}[{i}]") for i, v in enumerate(listed)]

    def identifier(self) -> str:
        """Return a string or integer as a string: corpora use both for the same ids."""
        if isinstance(self.value, bool) or not isinstance(self.value, str | int):
            self.refuse("must be a string or an integer")
        self._must_be_text(str(self.value))
        return str(self.value)

    def identifiers(self) -> list[str]:
        """Return a list of identifiers; a single identifier counts as a list of one."""
        if isinstance(self.value, list):
            return [e.identifier() for e in self.elements()]
        return [self.identifier()]

    def path_part(self) -> str:
        """Return an identifier that is a safe relative path without '..'."""
        return check_path_part(self.identifier(), self.file, self.key)

    def refuse(self, message: str) -> NoReturn:
        """Raise InputError at this node."""
        raise InputError(message, file=self.file, key=self.key or None)

    def _must_be_text(self, text: str) -> None:
        if not is_text(text):
            self.refuse(HALF_A_CHARACTER)

    def _below(self, name: str) -> str:
        return f"{self.key}.{name}" if self.key else name


_NAMES: Mapping[type, str] = {dict: "object", list: "list", str: "string", int: "number"}


def check_path_part(name: str, file: Path, key: str) -> str:
    """Return `name` if it is a relative path without '..'; InputError otherwise."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise InputError("this name points outside the corpus", file=file, key=key)
    return name
