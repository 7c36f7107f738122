"""W&B artifacts of a run's files: uploads of small files, references to large ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcot_rl.monitoring.trackers.tracker import TrackedArtifact, TrackedStage
from rcot_rl.system.files import visible

if TYPE_CHECKING:
    import wandb

SMALL_BYTES = 4 << 20
"""With `artifacts: references`, files up to this size are uploaded."""

HASHED_BYTES = 256 << 20
"""The checksum of a reference to a larger file is its size and time, not of its content."""

MAX_FILES = 100
"""A folder with more files, such as predicted masks, is one reference beside its own files."""


def artifact_name(stage: TrackedStage, artifact: TrackedArtifact) -> str:
    """Return the name of an artifact in the project.

    Data keep their name, so that runs which use equal data share a version. What a run made has
    the run's name before it.
    """
    shared = artifact.kind in ("corpus", "shards")
    return accepted_name(artifact.name if shared else f"{stage.run_id}-{artifact.name}")


def accepted_name(name: str) -> str:
    """Return a name with only characters that W&B accepts in ids and artifacts."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:128]


def fill_artifact(item: wandb.Artifact, path: Path, *, copies: bool) -> int:
    """Add the files at `path` to an artifact; return the number of bytes to upload."""
    path = path.resolve()
    files = [path] if path.is_file() else visible(p for p in path.rglob("*") if p.is_file())
    if not copies and len(files) > MAX_FILES:
        _refer_to_folder(item, path, files)
        files = [file for file in files if file.parent == path]
    uploaded = 0
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        state = file.stat()
        if copies or state.st_size <= SMALL_BYTES:
            item.add_file(str(file), name=name, policy="immutable", skip_cache=True)
            uploaded += state.st_size
            continue
        hashed = state.st_size <= HASHED_BYTES
        (entry,) = item.add_reference(file.as_uri(), name=name, checksum=hashed)
        if not hashed:
            entry.digest = f"{state.st_size}-{state.st_mtime_ns}"
    return uploaded


def _refer_to_folder(item: wandb.Artifact, path: Path, files: Sequence[Path]) -> None:
    """Add one reference to a folder.

    Its checksum covers the files' names and sizes, and their content up to HASHED_BYTES in all.
    """
    from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
    from wandb.sdk.lib.paths import LogicalPath

    sizes = {file: file.stat().st_size for file in files}
    total = sum(sizes.values())
    digest = hashlib.sha256()
    for file, size in sizes.items():
        digest.update(f"{file.relative_to(path).as_posix()}\n{size}\n".encode())
        if total <= HASHED_BYTES:
            digest.update(file.read_bytes())
    item.manifest.add_entry(
        ArtifactManifestEntry(
            path=LogicalPath(path.name), digest=digest.hexdigest(), ref=path.as_uri(), size=total
        )
    )
