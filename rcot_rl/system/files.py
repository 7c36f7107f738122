"""Atomic writes (a temporary name in the same folder, then a rename), links and listings."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rcot_rl.errors import InputError
from rcot_rl.system.disk import explained


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; readers see the old file or the new one. Creates the folder."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` as `write_text` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises InputError."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"not readable as JSON: {error}", file=path) from error
    if not isinstance(value, dict):
        raise InputError("must be a JSON object", file=path)
    return value


def sha256_of(path: Path, flush: bool = False) -> str:
    """Return the hex digest of a file; flush: also force its content to the disk."""
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Hard-link the file `source` to `target`, or copy it if links are not possible.

    Raises:
        FileExistsError: `target` exists.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links, another file system, too many links
        shutil.copy2(source, target)


def replace_folder(new: Path, target: Path) -> None:
    """Rename the folder `new` to `target`, which may be a folder, a link or a file."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir() and not target.is_symlink():
        target.rename(old)
    else:
        target.unlink(missing_ok=True)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def visible(paths: Iterable[Path]) -> list[Path]:
    """Return the paths sorted, without hidden ones.

    Finder, Windows shares and network file systems create files such as `._00001.jpg`, `.DS_Store`
    and `.nfs0001`, which are not part of the data.
    """
    return sorted(path for path in paths if not path.name.startswith("."))


def suffix_counts(paths: Iterable[Path]) -> str:
    """Return the files of each type, such as `12 .jpg (00000.jpg) and 1 .webp (00003.webp)`."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for path in paths:
        counts[path.suffix.lower()] += 1
        first.setdefault(path.suffix.lower(), path.name)
    parts = [f"{n} {suffix} ({first[suffix]})" for suffix, n in counts.most_common()]
    return " and ".join(parts)


_NAMES = ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST")
_NOT_WRITABLE = frozenset(getattr(errno, name) for name in _NAMES)


@contextmanager
def writing(place: Path, errnos: frozenset[int] = _NOT_WRITABLE) -> Iterator[None]:
    """Turn an OSError of lacking space or permission into an InputError. Raises InputError.

    Args:
        place: What the error names if the OSError has no file name.
        errnos: The errors to convert; others pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in errnos:
            raise
        where = error.filename or place
        raise InputError(f"cannot be written: {explained(error, where)}", file=where) from error
