"""manifest.json of a shard set: its figures, and the checksums by which it is verified."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.drawing import Instance

MANIFEST = "manifest.json"
VERSION = 1


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Atomically."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def counts_of(rows: Iterable[Instance]) -> dict[str, int]:
    """How many rows there are of each kind."""
    return tally((r.task, r.option, r.target, r.dataset) for r in rows)


def tally(rows: Iterable[tuple[str, str, str, str]]) -> dict[str, int]:
    """Counts of (task, option, target, dataset): `ktg`, `ktg/single`, `aks/A`, `dataset/mevis`…"""
    out: Counter[str] = Counter()
    for task, option, target, dataset in rows:
        out[task] += 1
        out[f"{task}/{target}"] += 1
        if task == "aks":
            out[f"aks/{option}"] += 1
        out[f"dataset/{dataset}"] += 1
    return dict(sorted(out.items()))


def ratios_of(counts: Mapping[str, int]) -> dict[str, float | None]:
    """`ktg single:multi` and `aks A:B`; None where the second is 0."""
    pairs = {
        "ktg single:multi": ("ktg/single", "ktg/multi"),
        "aks A:B": ("aks/A", "aks/B"),
    }
    return {
        name: counts.get(a, 0) / counts[b] if counts.get(b) else None
        for name, (a, b) in pairs.items()
        if counts.get(a) or counts.get(b)
    }
