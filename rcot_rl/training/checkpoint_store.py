"""Checkpoints of a stage on disk: complete or absent, found again after any failure, pruned.

    CHECKPOINTS/global_step_N/checkpoint.json      step, world size, files with sizes and sha256
    CHECKPOINTS/global_step_N/metrics.json         the step's metrics (GRPO)
    CHECKPOINTS/latest                             the newest one's name, replaced atomically
    CHECKPOINTS/latest_checkpointed_iteration.txt  verl's pointer, which verl writes in place

`seal` writes the manifest when all else is there, so that a checkpoint with one is whole; one
without (its process may have been killed before the seal) is judged by its structure. `settle` says
from where a stage can go on. Imports no torch: commands list and verify in no time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcot_rl.disk import LEAST_FREE, shortage
from rcot_rl.errors import InputError
from rcot_rl.files import write_text

MANIFEST = "checkpoint.json"
METRICS = "metrics.json"
LATEST = "latest"
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's pointer to the newest checkpoint."""

_STEP = re.compile(r"global_step_(\d{1,12})")
_RANKED = re.compile(r"(model|optim|extra_state)_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint's folder, as found."""

    path: Path
    step: int
    sealed: bool
    faults: tuple[str, ...]
    """What is missing or wrong; empty: whole."""
    size: int
    """Bytes."""
    world_size: int | None
    time: float
    """Seconds since the epoch."""

    @property
    def whole(self) -> bool:
        return not self.faults


def seal(checkpoint: Path, **facts: Any) -> None:
    """Write the manifest of a finished checkpoint; facts: JSON values to keep with it. The disk
    has every file before it has the manifest, also when the host loses power."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    files = {
        name: {"size": path.stat().st_size, "sha256": _sha256(path, flush=True)}
        for name, path in _files(checkpoint)
    }
    found = {
        "step": step_of(checkpoint),
        "time": time.time(),
        "world_size": _world_size(checkpoint),
        "files": files,
        **facts,
    }
    write_text(checkpoint / MANIFEST, json.dumps(found, indent=1) + "\n")


def inspect(checkpoint: Path, deep: bool = False) -> Checkpoint:
    """What there is of a checkpoint; deep: checksums too, not only sizes."""
    manifest = checkpoint / MANIFEST
    sealed = manifest.is_file()
    faults = list(_against_manifest(checkpoint, deep) if sealed else _by_structure(checkpoint))
    size = sum(path.stat().st_size for _, path in _files(checkpoint))
    return Checkpoint(
        checkpoint, step_of(checkpoint), sealed, tuple(faults), size, _world_size(checkpoint),
        checkpoint.stat().st_mtime,
    )  # fmt: skip


def all_of(checkpoints: Path, deep: bool = False) -> list[Checkpoint]:
    """Every checkpoint below the folder, by step."""
    if not checkpoints.is_dir():
        return []
    found = [p for p in checkpoints.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()]
    return [inspect(p, deep) for p in sorted(found, key=step_of)]


def settle(checkpoints: Path) -> int:
    """The step of the newest whole checkpoint, to which verl's pointer and `latest` are set; 0 when
    there is none but a stage's start. Deletes nothing: verl writes over what is broken."""
    whole = [c for c in all_of(checkpoints) if c.whole]
    if not whole:
        (checkpoints / TRACKER).unlink(missing_ok=True)
        return 0
    newest = whole[-1]
    write_text(checkpoints / TRACKER, str(newest.step))
    point_latest(newest.path)
    return newest.step


def prune(checkpoints: Path, keep: int, dry_run: bool = False) -> list[Path]:
    """Delete all but the newest `keep` whole checkpoints, and broken ones older than the newest
    whole one; returns what was (or would be) deleted. Also those of earlier attempts."""
    if keep < 1:
        raise InputError("at least one checkpoint must be kept", key="--keep")
    found = all_of(checkpoints)
    whole = [c for c in found if c.whole]
    if not whole:
        return []
    kept = {c.path for c in whole[-keep:]}
    doomed = [c.path for c in found if c.path not in kept and c.step < whole[-1].step]
    for path in doomed:
        if not dry_run:
            # renamed first: a half-deleted folder must not look like a checkpoint
            gone = path.with_name(f".{path.name}.deleted")
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)
            shutil.rmtree(gone)
    return doomed


def make_room(checkpoints: Path, keep: int | None) -> None:
    """Before a checkpoint is written: raise InputError if it will not fit, even after pruning.

    Its size is taken from the newest whole one (`room_needed`).
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    needed = room_needed(checkpoints)
    lack = shortage(checkpoints, needed)
    if lack is not None and lack.passes and keep is not None:
        prune(checkpoints, 1)
        lack = shortage(checkpoints, needed)
    if lack is not None:
        raise InputError(f"no room for a checkpoint: {lack.text}", file=checkpoints)


def room_needed(checkpoints: Path) -> int:
    """Bytes to have free before a checkpoint is written: the newest whole one's size and a tenth,
    and in any case what logs and metrics need meanwhile (256 MiB)."""
    whole = [c for c in all_of(checkpoints) if c.whole and c.step > 0]
    return max(LEAST_FREE, int(1.1 * whole[-1].size) if whole else 0)


def point_latest(checkpoint: Path) -> None:
    """Write the name of `checkpoint` to the file `latest` beside it; readers see old or new."""
    latest = checkpoint.parent / LATEST
    if latest.is_dir() and not latest.is_symlink():
        shutil.rmtree(latest)  # an earlier version's link, followed when the run was copied
    write_text(latest, checkpoint.name + "\n")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint's folder that `path` names: global_step_N, or `latest` beside such folders.

    `latest` is a file that holds the folder's name. In runs of earlier versions it is a link or,
    where a copy followed the link, a folder: a duplicate of the checkpoint. Raises InputError.
    """
    if path.name != LATEST:
        found = path
    elif path.is_file():
        name = path.read_text(encoding="utf-8", errors="replace").strip()
        if not _STEP.fullmatch(name):
            raise InputError("does not hold the name of a checkpoint (global_step_N)", file=path)
        found = path.with_name(name)
    elif path.is_symlink() or not path.is_dir():
        found = path.resolve()
    else:
        found = path.with_name(f"global_step_{_sealed_step(path)}")
    if not found.is_dir():
        raise InputError("no such checkpoint", file=found)
    return found.resolve()


def _sealed_step(folder: Path) -> int:
    try:
        return int(json.loads((folder / MANIFEST).read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("does not say of which step it is; name global_step_N", file=folder) from (
            error
        )


def _files(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path.relative_to(checkpoint).as_posix(), path


def step_of(checkpoint: Path) -> int:
    """Step of a checkpoint's folder, from its name. Raises InputError for another name."""
    found = _STEP.fullmatch(checkpoint.name)
    if found is None:
        raise InputError("is no checkpoint (global_step_N)", file=checkpoint)
    return int(found[1])


def _world_size(checkpoint: Path) -> int | None:
    sizes = {int(m[2]) for _, p in _files(checkpoint) if (m := _RANKED.fullmatch(p.name))}
    return sizes.pop() if len(sizes) == 1 else None


def _against_manifest(checkpoint: Path, deep: bool) -> Iterator[str]:
    try:
        listed = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        expected = {str(n): (int(f["size"]), str(f["sha256"])) for n, f in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield f"{MANIFEST} cannot be read"
        return
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if ".." in Path(name).parts or not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes, not {size}"
        elif deep and _sha256(path) != digest:
            yield f"{name} differs from its checksum"


def _by_structure(checkpoint: Path) -> Iterator[str]:
    """Every rank's model, optimizer and extra state, each a whole archive, and its position in the
    data: of GRPO one for all, of CoT-SFT one for each rank."""
    ranks: dict[tuple[str, int], set[int]] = {}
    folders = {path.parent for _, path in _files(checkpoint) if _RANKED.fullmatch(path.name)}
    if not folders:
        yield "no rank's files"
        return
    for folder in folders:
        for path in folder.glob("*.pt"):
            found = _RANKED.fullmatch(path.name)
            if found:
                ranks.setdefault((found[1], int(found[2])), set()).add(int(found[3]))
            if not zipfile.is_zipfile(path):
                yield f"{path.relative_to(checkpoint)} is cut short"
    data = checkpoint / "data.pt"
    if (checkpoint / "actor").is_dir() and step_of(checkpoint) and not zipfile.is_zipfile(data):
        yield "data.pt (the position in the data) is missing or cut short"
    sizes = {size for _, size in ranks}
    if len(sizes) != 1:
        yield f"files of several world sizes: {sorted(sizes)}"
        return
    (size,) = sizes
    for kind in ("model", "optim", "extra_state"):
        missing = sorted(set(range(size)) - ranks.get((kind, size), set()))
        if missing:
            yield f"{kind} of rank {missing[0]} is missing"
    if not (checkpoint / "actor").is_dir():
        for rank in range(size):
            if not zipfile.is_zipfile(checkpoint / f"data_{rank}.pt"):
                yield f"data_{rank}.pt (the position in the data) is missing or cut short"


def _sha256(path: Path, flush: bool = False) -> str:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
