"""YAML with a memory: which file and line each key of a merged recipe came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rcot_rl.errors import InputError

Key = tuple[str | int, ...]
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises for a text at fault; for a date such as 2020-13-45, a bare ValueError."""
MAX_KEYS = 100_000
"""Most keys of one file: aliases of aliases can stand for more than any memory holds."""


@dataclass
class Source:
    """A plain tree of values, and the place of every key in it."""

    tree: dict[str, Any]
    places: dict[Key, tuple[str, int | None]] = field(default_factory=dict)
    typed: dict[Key, Key] = field(default_factory=dict)
    """Keys that were given by another name: `grpo_aks.steps` as `grpo.steps`."""

    def name(self, key: Key) -> str:
        """The dotted key, as it was given."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.typed:
                return _dotted((*self.typed[key[:end]], *key[end:]))
            if key[:end] in self.places:
                break
        return _dotted(key)

    def place(self, key: Key) -> tuple[str | None, int | None]:
        """File and line of `key`, or of its nearest ancestor that has one."""
        for end in range(len(key), -1, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        return None, None

    def merge(self, over: Source, replaced: frozenset[Key] = frozenset()) -> Source:
        """`over` wins key by key; mappings merge, but for `replaced`; lists and scalars do not."""
        places = dict(self.places)
        tree = _merge(self.tree, over.tree, (), replaced)
        places.update(over.places)
        typed = {k: v for k, v in self.typed.items() if k not in over.places} | over.typed
        return Source(tree, places, typed)


def _merge(
    base: Mapping[str, Any], over: Mapping[str, Any], at: Key, replaced: frozenset[Key]
) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        here = (*at, key)
        merged = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        if merged and here not in replaced:
            out[key] = _merge(out[key], value, here, replaced)
        else:
            out[key] = value
    return out


def read_yaml(path: Path) -> Source:
    """One YAML mapping. Raises InputError for what is not one, and for a key given twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError("no such file", file=path) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", file=path) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except NOT_YAML as error:
        message, line = yaml_fault(error)
        raise InputError(message, file=path, line=line) from error
    if not isinstance(tree, dict) or not isinstance(node, yaml.MappingNode):
        raise InputError("must be a mapping of keys to values", file=path, line=1)
    source = Source(tree)
    source.places[()] = (str(path), None)
    _note_places(node, (), str(path), source.places)
    return source


def yaml_fault(error: Exception) -> tuple[str, int | None]:
    """What is wrong with a text that raised one of `NOT_YAML`, on one line, and where if known."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    if isinstance(error, RecursionError):
        problem = "nested too deep"
    return f"not valid YAML: {problem}", mark.line + 1 if mark else None


def _note_places(
    node: yaml.Node,
    prefix: Key,
    file: str,
    places: dict[Key, tuple[str, int | None]],
    inside: frozenset[int] = frozenset(),
) -> None:
    if id(node) in inside:
        line = node.start_mark.line + 1
        raise InputError("holds itself", file=file, line=line, key=_dotted(prefix))
    if len(places) > MAX_KEYS:
        raise InputError(f"has more than {MAX_KEYS} keys, aliases written out", file=file)
    inside |= {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                raise InputError("given twice", file=file, line=line, key=_dotted((*prefix, key)))
            seen.add(key)
            places[(*prefix, key)] = (file, line)
            _note_places(value_node, (*prefix, key), file, places, inside)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*prefix, index)] = (file, item.start_mark.line + 1)
            _note_places(item, (*prefix, index), file, places, inside)


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))
