"""Free space of the run's file system and the size of its newest checkpoint, at every step."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path

from rcot_rl.errors import InputError
from rcot_rl.training.checkpoint_store import LATEST, MANIFEST, find_checkpoint
from rcot_rl.training.gpu_sampler import GIB


def storage_metrics(checkpoints: Path) -> dict[str, float]:
    """Return `disk/free_gib`, and `checkpoint/size_gib` once there is a sealed checkpoint.

    Args:
        checkpoints: The stage's folder of checkpoints, which the first save creates.
    """
    place = next(p for p in (checkpoints, *checkpoints.absolute().parents) if p.is_dir())
    metrics = {"disk/free_gib": shutil.disk_usage(place).free / GIB}
    try:
        size = _sealed_bytes(find_checkpoint(checkpoints / LATEST))
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return metrics  # no checkpoint yet, or it is just being pruned
    return metrics | {"checkpoint/size_gib": size / GIB}


@lru_cache(maxsize=1)
def _sealed_bytes(checkpoint: Path) -> int:
    """Return the bytes that a checkpoint's manifest lists."""
    files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
    return sum(int(file["size"]) for file in files.values())
