"""Find a YAML file by name or path and read it with everything that it extends.

Recipes and reward recipes share these rules: what a name means, where `extends` may point, and how
an override on the command line is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rcot_rl.errors import InputError
from rcot_rl.recipe.source import NOT_YAML, Key, Source, read_yaml
from rcot_rl.suggestions import did_you_mean, nearest

_SUFFIXES = (".yaml", ".yml")
_QUOTES = tuple("'\"|>!&")
"""Starts of a YAML value that stands for another text."""


@dataclass(frozen=True)
class Shipped:
    """The YAML files of one kind that the project ships."""

    folder: Path
    noun: str
    """What such a file is called in errors."""

    @property
    def names(self) -> list[str]:
        """Names of the files, without their suffix."""
        return sorted(path.stem for path in self.folder.glob("*.yaml"))

    def find(self, name_or_path: str | Path, base: Path | None = None) -> Path:
        """Return the file that a name or a path means.

        A text that ends in `.yaml` or `.yml`, or is the path of a file, is a path; anything else is
        the name of a shipped file.

        Args:
            name_or_path: What the user wrote.
            base: Folder that a relative path counts from; None: the working directory.

        Raises:
            InputError: There is no such file; a close name is suggested.
        """
        path = Path(name_or_path) if base is None else base / name_or_path
        if path.is_file():
            return path
        if path.suffix in _SUFFIXES:
            shipped = self.folder / path.name
            if base is not None and "/" not in str(name_or_path) and shipped.is_file():
                return shipped
            raise InputError(f"no such {self.noun}{self._hint(path)}", file=path)
        if str(name_or_path) in self.names:
            return self.folder / f"{name_or_path}.yaml"
        hint = did_you_mean(str(name_or_path), self.names)
        raise InputError(
            f"no such {self.noun}{hint} (shipped: {', '.join(self.names)})", file=str(name_or_path)
        )

    def _hint(self, path: Path) -> str:
        """Suggest a file beside a path that does not exist, or a shipped one."""
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, [name for name in names if name.endswith(_SUFFIXES)])
        if near is not None:
            return f"; did you mean {path.parent / near}?"
        return did_you_mean(path.stem, self.names)


def read_layers(
    path: Path, shipped: Shipped, above: tuple[Path, ...] = (), base: str | None = None
) -> list[Source]:
    """Read a file and the files that it extends, to any depth; the lowest layer comes first.

    Args:
        path: The file.
        shipped: Where a name under `extends` is looked up.
        above: The files that extend this one.
        base: Name or path, relative to the working directory, of what the file extends instead.

    Raises:
        InputError: A file is missing, is no YAML mapping, or the `extends` are circular.
    """
    path = path.resolve()
    if path in above:
        circle = " -> ".join(p.name for p in dict.fromkeys(above)) + f" -> {path.name}"
        raise InputError(f"circular `extends`: {circle}", file=path, key="extends")
    source = read_yaml(path)
    parent = source.tree.pop("extends", None)
    if base is not None:
        return [*read_layers(shipped.find(base), shipped, (*above, path)), source]
    if parent is None:
        return [source]
    line = source.places[("extends",)][1]
    return [*parent_layers(parent, path, line, shipped, (*above, path)), source]


def parent_layers(
    parent: Any,
    path: Path,
    line: int | None,
    shipped: Shipped,
    above: tuple[Path, ...],
    key: str = "extends",
) -> list[Source]:
    """Read the file that `parent`, the value of `key` in `path`, names; as `read_layers`."""
    if not isinstance(parent, str):
        message = f"must be the name or the path of a {shipped.noun}"
        raise InputError(message, file=path, line=line, key=key)
    try:
        target = shipped.find(parent, path.parent)
    except InputError as error:
        problem = f"no such {shipped.noun}"
        message = error.message.replace(problem, f"{problem}: {parent}", 1)
        raise InputError(message, file=path, line=line, key=key) from error
    return read_layers(target, shipped, above)


def nested(dotted: str, value: Any, where: str = "command line") -> Source:
    """Return the tree that has `value` at a dotted key, with `where` as every key's place."""
    keys = dotted.split(".")
    tree: Any = value
    for key in reversed(keys):
        tree = {key: tree}
    places: dict[Key, tuple[str, int | None]] = {
        tuple(keys[: end + 1]): (where, None) for end in range(len(keys))
    }
    return Source(tree, places)


def read_overrides(texts: Iterable[str]) -> Source:
    """Read `key.path=value` overrides, values in YAML; later ones win. Raises InputError."""
    merged = Source({})
    for text in texts:
        merged = merged.merge(nested(*parse_override(text)))
    return merged


def parse_override(text: str) -> tuple[str, Any]:
    """Return the dotted key and the value of `key.path=value`. Raises InputError."""
    where = "command line"
    dotted, equals, value_text = text.partition("=")
    if not equals or not dotted:
        raise InputError(f"'{text}' is not key.path=value", file=where)
    try:
        value = yaml.safe_load(value_text)
    except NOT_YAML as error:
        raise InputError(f"'{value_text}' is not a YAML value", file=where, key=dotted) from error
    plain = isinstance(value, str) and value_text[:1] not in _QUOTES
    if plain and value.split() != value_text.split():
        # YAML takes ' #' for a comment: a path would silently become another one
        message = f"YAML reads '{value_text}' as '{value}'; put the value in quotes"
        raise InputError(message, file=where, key=dotted)
    return dotted, value
