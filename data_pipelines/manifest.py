"""manifest.json of a shard set: its figures, and the checksums by which it is verified."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from data_pipelines.planning.row_drawing import Instance

MANIFEST = "manifest.json"
VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Asked(_Part):
    aks: StrictInt = Field(ge=0)
    ktg: StrictInt = Field(ge=0)
    val: StrictInt = Field(ge=0)


class _Data(_Part):
    media: Literal["embedded", "referenced"] = "embedded"
    clip_frames: StrictInt = Field(default=0, ge=0)
    sets: dict[str, _Asked] = {}
    a_to_b: float | None = Field(default=None, gt=0)
    single_multi: float | None = Field(default=None, gt=0)
    allow_smaller: StrictBool = False


class _Recipe(_Part):
    data: _Data = _Data()
    canvas: StrictInt | None = None


class _Pixels(BaseModel):
    model_config = ConfigDict(extra="forbid")
    cell: StrictInt = Field(gt=0)
    least: StrictInt
    most: StrictInt


class _Tokens(_Part):
    pixels: _Pixels
    limits: dict[Literal["prompt_tokens", "total_tokens"], StrictInt]


class _Manifest(_Part):
    """What `rcot data check` compares rows with."""

    version: StrictInt
    name: str
    rows: dict[str, StrictInt]
    counts: dict[str, dict[str, StrictInt]]
    files: dict[str, str]
    recipe: _Recipe
    recipe_hash: str
    ratios: dict[str, dict[str, float | None]]
    dropped: dict[str, Any]
    tokens: _Tokens | None = None


def manifest_fault(manifest: Any) -> tuple[str, str] | None:
    """(key, what is wrong) of a document that cannot be a manifest; None of one that can."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return ".".join(map(str, first["loc"])), first["msg"]
    return None


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
