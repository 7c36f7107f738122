"""Users' rewards: find the function that a spec names, and what identifies it.

| spec | function |
| --- | --- |
| `FILE.py:FUNCTION` | in a file; a relative path starts at the working directory |
| `pkg://package.module:FUNCTION` | in a module; the default is `compute_score`, as in verl |
| a name | an installed entry point of the group `rcot_rl.rewards` |

An entry point with the name of a shipped recipe is an error, never a silent replacement. No user
code is executed here; `guard.py` does that, in another process. `user_load.py` defines the accepted
signatures, `user_result.py` the accepted results.

The hash does not cover what the function imports.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from rcot_rl.errors import InputError
from rcot_rl.system.paths import check_path

GROUP = "rcot_rl.rewards"
PKG = "pkg://"
DEFAULT_FUNCTION = "compute_score"


@dataclass(frozen=True)
class FileSource:
    """FILE.py:FUNCTION, with the file's content at load time, which restarted children run too."""

    spec: str
    path: Path
    name: str
    source: bytes

    @property
    def digest(self) -> str:
        """sha256 of the file's content and the function's name."""
        return hashlib.sha256(self.source + b"\0" + self.name.encode()).hexdigest()


@dataclass(frozen=True)
class ModuleSource:
    """A function of an importable module."""

    spec: str
    module: str
    name: str


UserSource = FileSource | ModuleSource


def is_user_reward(spec: str) -> bool:
    """Return True if a spec has the form FILE.py:FUNCTION or pkg://MODULE."""
    file, colon, function = spec.rpartition(":")
    of_file = bool(colon) and file.endswith(".py") and function.isidentifier()
    return of_file or spec.startswith(PKG)


def find_source(spec: str, shipped: frozenset[str] = frozenset()) -> UserSource | None:
    """Find the function that `spec` names. Raises InputError.

    Args:
        spec: FILE.py:FUNCTION, pkg://MODULE, or a name.
        shipped: Names that entry points must not have.

    Returns:
        The function, or None if the spec names a recipe.
    """
    if spec.startswith(PKG):
        return _module(spec, spec.removeprefix(PKG).replace("/", "."))
    if is_user_reward(spec):
        return _file(spec)
    if spec.endswith(".py"):
        raise InputError("name the function too: FILE.py:FUNCTION", file=spec)
    points = _entry_points().get(spec, ())
    if points and spec in shipped:
        raise InputError(
            f"is a shipped recipe and an entry point of {GROUP} in {points[0][0]}; "
            "rename the entry point",
            key=spec,
        )
    if len(points) > 1:
        names = " and ".join(distribution for distribution, _ in points)
        raise InputError(f"is an entry point of {GROUP} in {names}; uninstall one", key=spec)
    return _module(spec, points[0][1]) if points else None


def absolute(spec: str) -> str:
    """Make the file path in `spec` absolute, for another working directory. Raises InputError."""
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
    """Return (distribution, module:function) of the installed entry points, by name."""
    from importlib.metadata import entry_points

    points: dict[str, list[tuple[str, str]]] = {}
    for point in entry_points(group=GROUP):
        distribution = point.dist.name if point.dist is not None else "an unnamed distribution"
        item = (distribution, point.value.split("[")[0].replace(" ", ""))
        if item not in points.setdefault(point.name, []):
            points[point.name].append(item)
    return points
