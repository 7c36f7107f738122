"""YAML trees that keep the file and line of each key, also after merging."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rcot_rl.errors import InputError

Key = tuple[str | int, ...]
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What PyYAML raises for an invalid text; for a date such as 2020-13-45, it is a ValueError."""
MAX_KEYS = 100_000
"""Maximum number of keys in a file: nested aliases can expand to more than fits into memory."""


@dataclass
class Source:
    """A tree of values with the place of every key."""

    tree: dict[str, Any]
    places: dict[Key, tuple[str, int | None]] = field(default_factory=dict)
    """File and line of each key."""
    typed: dict[Key, Key] = field(default_factory=dict)
    """Keys that the user wrote under another name: `train.grpo-aks.steps` as `grpo.steps`."""

    def name(self, key: Key) -> str:
        """Return the dotted key as the user wrote it."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.typed:
                return _dotted((*self.typed[key[:end]], *key[end:]))
            if key[:end] in self.places:
                break
        return _dotted(key)

    def place(self, key: Key) -> tuple[str | None, int | None]:
        """Return file and line of `key`, or of its nearest ancestor with a place."""
        for end in range(len(key), -1, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        return None, None

    def merge(self, over: Source, rules: MergeRules | None = None) -> Source:
        """Return both trees merged: mappings key by key, other values replaced by those of `over`.

        Args:
            over: The tree that wins.
            rules: Exceptions.
        """
        gone: list[Key] = []
        tree = _merge(self.tree, over.tree, (), rules or MergeRules(), gone)
        starts = set(gone)

        def is_gone(key: Key) -> bool:
            return any(key[:end] in starts for end in range(1, len(key) + 1))

        places = {k: v for k, v in self.places.items() if not is_gone(k)} | over.places
        typed = {
            k: v for k, v in self.typed.items() if k not in over.places and not is_gone(k)
        } | over.typed
        return Source(tree, places, typed)

    def under(self, key: Key) -> Source:
        """Return the tree as the value of a key of another tree, with the places of its keys."""
        tree: Any = self.tree
        for name in reversed(key):
            tree = {name: tree}
        return Source(
            tree,
            {(*key, *below): place for below, place in self.places.items()},
            {(*key, *below): given for below, given in self.typed.items()},
        )


@dataclass(frozen=True)
class MergeRules:
    """Exceptions to the rule that mappings merge key by key."""

    replaced: frozenset[Key] = frozenset()
    """Mappings that are replaced as a whole."""
    restart: Callable[[Key], tuple[str, ...]] = lambda key: ()
    """Returns keys of a mapping; another value of one means that the mapping inherits nothing."""
    removable: Callable[[Key], bool] = lambda key: False
    """Returns True for keys that null removes; elsewhere null is a value."""


def _merge(
    base: Mapping[str, Any], over: Mapping[str, Any], at: Key, rules: MergeRules, gone: list[Key]
) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        here, old = (*at, key), out.get(key)
        if value is None and rules.removable(here):
            out.pop(key, None)
            gone.append(here)
            continue
        if not isinstance(old, Mapping):
            out[key] = value
        elif (
            isinstance(value, Mapping)
            and here not in rules.replaced
            and _continues(old, value, rules.restart(here))
        ):
            out[key] = _merge(old, value, here, rules, gone)
        else:
            gone.append(here)
            out[key] = value
    return out


def _continues(old: Mapping[str, Any], new: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Return False if `new` gives one of these keys another value than `old`."""
    return all(name not in new or new[name] == old.get(name) for name in names)


def read_yaml(path: Path) -> Source:
    """Read a YAML file with one mapping.

    Raises:
        InputError: The file is missing or is not a YAML mapping, or it has a duplicate key, a
            recursive alias or too many keys.
    """
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
    """Return a one-line message for an exception of `NOT_YAML`, and the line if it is known."""
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
        raise InputError("recursive YAML alias", file=file, line=line, key=_dotted(prefix))
    if len(places) > MAX_KEYS:
        raise InputError(f"has more than {MAX_KEYS} keys after expanding aliases", file=file)
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
