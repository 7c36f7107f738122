"""Users' own rewards: which function a text names, and what identifies it.

| text | the function |
| --- | --- |
| `FILE.py:FUNCTION` | of a file; a relative path is from the working directory |
| `pkg://package.module:FUNCTION` | of a module; `compute_score` if none is named, as in verl |
| a name | an installed entry point of the group `rcot_rl.rewards` |

Shipped recipes come first: an entry point of a shipped recipe's name is an error, never a silent
replacement. Nothing of the user's is executed here; `guard.py` does that, in another process.
`user_load.py` says what a function may look like and return.

Left out: what the function itself imports is no part of the hash.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from rcot_rl.errors import InputError
from rcot_rl.paths import check_path

GROUP = "rcot_rl.rewards"
PKG = "pkg://"
DEFAULT_FUNCTION = "compute_score"


@dataclass(frozen=True)
class FileSource:
    """FILE.py:FUNCTION, with the file as it was when the reward was loaded.

    A child that is started again runs the same text, whatever became of the file.
    """

    spec: str
    path: Path
    name: str
    source: bytes

    @property
    def digest(self) -> str:
        """sha256 of the file and the function's name."""
        return hashlib.sha256(self.source + b"\0" + self.name.encode()).hexdigest()


@dataclass(frozen=True)
class ModuleSource:
    """A function of an importable module."""

    spec: str
    module: str
    name: str


Source = FileSource | ModuleSource


def is_user_reward(spec: str) -> bool:
    """Whether a reward is given as FILE.py:FUNCTION or pkg://MODULE."""
    file, colon, function = spec.rpartition(":")
    of_file = bool(colon) and file.endswith(".py") and function.isidentifier()
    return of_file or spec.startswith(PKG)


def find_source(spec: str, shipped: frozenset[str] = frozenset()) -> Source | None:
    """The function that `spec` names; None when it names none, and a recipe is meant.

    shipped: names that entry points may not take. Raises InputError for a file that cannot be
    read, a malformed text, and a name that is taken twice.
    """
    if spec.startswith(PKG):
        return _module(spec, spec.removeprefix(PKG).replace("/", "."))
    if is_user_reward(spec):
        return _file(spec)
    if spec.endswith(".py"):
        raise InputError("name the function too: FILE.py:FUNCTION", file=spec)
    found = _entry_points().get(spec, ())
    if found and spec in shipped:
        raise InputError(
            f"is a shipped recipe, and an entry point of {GROUP} in {found[0][0]}; "
            "rename the entry point",
            key=spec,
        )
    if len(found) > 1:
        names = " and ".join(distribution for distribution, _ in found)
        raise InputError(f"is an entry point of {GROUP} in {names}", key=spec)
    return _module(spec, found[0][1]) if found else None


def absolute(spec: str) -> str:
    """`spec` with a file's path made absolute, for a process with another working directory.

    Raises InputError for a path that the process would interpret.
    """
    if not spec.startswith(PKG) and is_user_reward(spec):
        file, _, function = spec.rpartition(":")
        check_path(file, handed_on=True)
        return f"{Path(file).resolve()}:{function}"
    return str(Path(spec).resolve()) if spec.endswith((".yaml", ".yml")) else spec


def _file(spec: str) -> FileSource:
    file, _, name = spec.rpartition(":")
    path = Path(file)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from error
    return FileSource(spec, path, name, source)


def _module(spec: str, target: str) -> ModuleSource:
    module, _, name = target.partition(":")
    name = name or DEFAULT_FUNCTION
    parts = [*module.split("."), *name.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise InputError("must be pkg://package.module or pkg://package.module:FUNCTION", key=spec)
    return ModuleSource(spec, module, name)


@functools.cache
def _entry_points() -> dict[str, list[tuple[str, str]]]:
    """Name to (distribution, module:function) of all that is installed; nothing is imported."""
    from importlib.metadata import entry_points

    found: dict[str, list[tuple[str, str]]] = {}
    for point in entry_points(group=GROUP):
        distribution = point.dist.name if point.dist is not None else "an unnamed distribution"
        item = (distribution, point.value.split("[")[0].replace(" ", ""))
        if item not in found.setdefault(point.name, []):
            found[point.name].append(item)
    return found
