"""Checkpoints of a stage on disk: complete or absent, found again after any failure, pruned.

    CHECKPOINTS/global_step_N/checkpoint.json      step, world size, files with sizes and sha256
    CHECKPOINTS/global_step_N/metrics.json         the step's metrics (GRPO)
    CHECKPOINTS/latest                             name of the newest one, replaced atomically
    CHECKPOINTS/latest_checkpointed_iteration.txt  verl's pointer, which verl writes in place

`seal` writes the manifest after everything else, so a checkpoint with a manifest is complete. One
without (its process may have been killed before the seal) is judged by its structure. `settle`
finds the step that a stage can resume from. Imports no torch, so that commands answer at once.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcot_rl.errors import InputError
from rcot_rl.system.disk import LEAST_FREE, shortage
from rcot_rl.system.files import sha256_of, write_text

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
METRICS = "metrics.json"
LATEST = "latest"
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's pointer to the newest checkpoint."""

_STEP = re.compile(r"global_step_(\d{1,12})")
_RANKED = re.compile(r"(model|optim|extra_state)_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """State of one checkpoint's folder on disk."""

    path: Path
    step: int
    sealed: bool
    faults: tuple[str, ...]
    """What is missing or wrong; empty for a complete checkpoint."""
    size: int
    """Bytes."""
    world_size: int | None
    """Number of ranks that wrote it; None if its files disagree."""
    time: float
    """Seconds since the epoch."""

    @property
    def whole(self) -> bool:
        """True if nothing is missing or wrong."""
        return not self.faults


def seal(checkpoint: Path, **facts: Any) -> None:
    """Write the manifest of a finished checkpoint.

    Every file is flushed to disk before the manifest is written, so that this also holds after a
    power failure.
    """
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    files = {
        name: {"size": path.stat().st_size, "sha256": sha256_of(path, flush=True)}
        for name, path in _files(checkpoint)
    }
    manifest = {
        "step": step_of(checkpoint),
        "time": time.time(),
        "world_size": _world_size(checkpoint),
        "files": files,
        **facts,
    }
    write_text(checkpoint / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def inspect(checkpoint: Path, deep: bool = False) -> Checkpoint:
    """Check a checkpoint's folder.

    Args:
        deep: Compare checksums too, not only sizes.
    """
    sealed = (checkpoint / MANIFEST).is_file()
    faults = _manifest_faults(checkpoint, deep) if sealed else _structure_faults(checkpoint)
    return Checkpoint(
        path=checkpoint,
        step=step_of(checkpoint),
        sealed=sealed,
        faults=tuple(faults),
        size=sum(path.stat().st_size for _, path in _files(checkpoint)),
        world_size=_world_size(checkpoint),
        time=checkpoint.stat().st_mtime,
    )


def all_of(checkpoints: Path, deep: bool = False) -> list[Checkpoint]:
    """Inspect every checkpoint in the folder `checkpoints`, in the order of steps."""
    if not checkpoints.is_dir():
        return []
    folders = [p for p in checkpoints.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()]
    return [inspect(p, deep) for p in sorted(folders, key=step_of)]


def settle(checkpoints: Path) -> int:
    """Point verl and `latest` to the newest complete checkpoint.

    Deletes nothing: verl overwrites broken checkpoints.

    Returns:
        Its step; 0 if there is none, or only step 0.
    """
    complete = [c for c in all_of(checkpoints) if c.whole]
    if not complete:
        (checkpoints / TRACKER).unlink(missing_ok=True)
        return 0
    newest = complete[-1]
    write_text(checkpoints / TRACKER, str(newest.step))
    point_latest(newest.path)
    return newest.step


def prune(checkpoints: Path, keep: int, dry_run: bool = False) -> list[Path]:
    """Delete all but the newest `keep` complete checkpoints, also those of earlier attempts.

    Broken ones older than the newest complete one are deleted too.

    Returns:
        The folders that were deleted, or would be with `dry_run`.
    """
    if keep < 1:
        raise InputError("must be at least 1", key="--keep")
    checked = all_of(checkpoints)
    complete = [c for c in checked if c.whole]
    if not complete:
        return []
    kept = {c.path for c in complete[-keep:]}
    pruned = [c.path for c in checked if c.path not in kept and c.step < complete[-1].step]
    for path in [] if dry_run else pruned:
        # renamed first: a half-deleted folder must not look like a checkpoint
        renamed = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
        shutil.rmtree(renamed)
    return pruned


def make_room(checkpoints: Path, keep: int | None) -> None:
    """Check before a save that the checkpoint fits on the disk; prune to one if it does not.

    Args:
        keep: Number of checkpoints to keep; None keeps all, so that nothing is pruned.

    Raises:
        InputError: It does not fit, even after pruning.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    needed = room_needed(checkpoints)
    lack = shortage(checkpoints, needed)
    if lack is not None and lack.passes and keep is not None:
        pruned = prune(checkpoints, 1)
        logger.warning("%s: %s; pruned %d checkpoints", checkpoints, lack.text, len(pruned))
        lack = shortage(checkpoints, needed)
    if lack is not None:
        raise InputError(f"no room for a checkpoint: {lack.text}", file=checkpoints)


def room_needed(checkpoints: Path) -> int:
    """Return the bytes that must be free before a save.

    1.1 times the size of the newest complete checkpoint, and at least what logs and metrics need
    meanwhile (256 MiB).
    """
    complete = [c for c in all_of(checkpoints) if c.whole and c.step > 0]
    return max(LEAST_FREE, int(1.1 * complete[-1].size) if complete else 0)


def point_latest(checkpoint: Path) -> None:
    """Write the name of `checkpoint` to the file `latest` beside it, atomically."""
    latest = checkpoint.parent / LATEST
    if latest.is_dir() and not latest.is_symlink():
        shutil.rmtree(latest)  # an earlier version's link, followed when the run was copied
    write_text(latest, checkpoint.name + "\n")


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint's folder that `path` names.

    `latest` is a file that holds the folder's name. In runs of earlier versions it is a link or,
    where a copy followed the link, a folder: a duplicate of the checkpoint. Raises InputError.
    """
    if path.name != LATEST:
        folder = path
    elif path.is_file():
        name = path.read_text(encoding="utf-8", errors="replace").strip()
        if not _STEP.fullmatch(name):
            raise InputError("does not name a checkpoint (global_step_N)", file=path)
        folder = path.with_name(name)
    elif path.is_symlink() or not path.is_dir():
        folder = path.resolve()
    else:
        folder = path.with_name(f"global_step_{_sealed_step(path)}")
    if not folder.is_dir():
        raise InputError("no such checkpoint", file=folder)
    return folder.resolve()


def _sealed_step(folder: Path) -> int:
    try:
        return int(json.loads((folder / MANIFEST).read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("has no step in its manifest; pass global_step_N", file=folder) from error


def _files(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path.relative_to(checkpoint).as_posix(), path


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint's folder. Raises InputError for another name."""
    match = _STEP.fullmatch(checkpoint.name)
    if match is None:
        raise InputError("is not a checkpoint (global_step_N)", file=checkpoint)
    return int(match[1])


def _world_size(checkpoint: Path) -> int | None:
    sizes = {int(m[2]) for _, p in _files(checkpoint) if (m := _RANKED.fullmatch(p.name))}
    return sizes.pop() if len(sizes) == 1 else None


def _manifest_faults(checkpoint: Path, deep: bool) -> Iterator[str]:
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
        elif deep and sha256_of(path) != digest:
            yield f"{name} differs from its checksum"


def _structure_faults(checkpoint: Path) -> Iterator[str]:
    """Check for every rank's model, optimizer and extra state, each a complete archive.

    The position in the data must be there too: one file for GRPO, one per rank for CoT-SFT.
    """
    ranks: dict[tuple[str, int], set[int]] = {}
    folders = {path.parent for _, path in _files(checkpoint) if _RANKED.fullmatch(path.name)}
    if not folders:
        yield "no rank's files"
        return
    for folder in folders:
        for path in folder.glob("*.pt"):
            match = _RANKED.fullmatch(path.name)
            if match:
                ranks.setdefault((match[1], int(match[2])), set()).add(int(match[3]))
            if not zipfile.is_zipfile(path):
                yield f"{path.relative_to(checkpoint)} is truncated"
    is_grpo = (checkpoint / "actor").is_dir()
    if is_grpo and step_of(checkpoint):
        yield from _position_faults(checkpoint / "data.pt")
    sizes = {size for _, size in ranks}
    if len(sizes) != 1:
        yield f"files of several world sizes: {sorted(sizes)}"
        return
    (size,) = sizes
    for kind in ("model", "optim", "extra_state"):
        missing = sorted(set(range(size)) - ranks.get((kind, size), set()))
        if missing:
            yield f"{kind} of rank {missing[0]} is missing"
    if not is_grpo:
        for rank in range(size):
            yield from _position_faults(checkpoint / f"data_{rank}.pt")


def _position_faults(file: Path) -> Iterator[str]:
    if not zipfile.is_zipfile(file):
        yield f"{file.name} (the position in the data) is missing or truncated"
