"""manifest.json of a shard set: its statistics, and the checksums that verify it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from data_pipelines.planning.row_drawing import Instance
from rcot_rl.protocol.parser import ResponseForm
from rcot_rl.system.files import write_text

MANIFEST = "manifest.json"
VERSION = 1


class _Permissive(BaseModel):
    model_config = ConfigDict(extra="allow")


class _ManifestSetSize(_Permissive):
    aks: StrictInt = Field(ge=0)
    ktg: StrictInt = Field(ge=0)
    val: StrictInt = Field(ge=0)


class _ManifestData(_Permissive):
    media: Literal["embedded", "referenced"] = "embedded"
    response: ResponseForm = "think_answer"
    clip_frames: StrictInt = Field(default=0, ge=0)
    sets: dict[str, _ManifestSetSize] = {}
    a_to_b: float | None = Field(default=None, gt=0)
    single_multi: float | None = Field(default=None, gt=0)
    allow_smaller: StrictBool = False


class _ManifestRecipe(_Permissive):
    data: _ManifestData = _ManifestData()
    canvas: StrictInt | None = None


class _ManifestPixels(BaseModel):
    model_config = ConfigDict(extra="forbid")
    cell: StrictInt = Field(gt=0)
    least: StrictInt
    most: StrictInt


class _ManifestTokens(_Permissive):
    pixels: _ManifestPixels
    limits: dict[Literal["prompt_tokens", "total_tokens"], StrictInt]


class _Manifest(_Permissive):
    """The keys that `rcot data check` compares with the rows."""

    version: StrictInt
    name: str
    rows: dict[str, StrictInt]
    counts: dict[str, dict[str, StrictInt]]
    files: dict[str, str]
    recipe: _ManifestRecipe
    recipe_hash: str
    ratios: dict[str, dict[str, float | None]]
    dropped: dict[str, Any]
    tokens: _ManifestTokens | None = None


def manifest_fault(manifest: Any) -> tuple[str, str] | None:
    """Return (key, message) of the first fault of a manifest's structure; None if it is valid."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return ".".join(map(str, first["loc"])), first["msg"]
    return None


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def counts_of(rows: Iterable[Instance]) -> dict[str, int]:
    """Count the rows of each kind; see `tally`."""
    return tally((r.task, r.option, r.target, r.dataset) for r in rows)


def tally(rows: Iterable[tuple[str, str, str, str]]) -> dict[str, int]:
    """Count rows of (task, option, target, dataset).

    Returns:
        Counts by `ktg`, `ktg/single`, `aks/A`, `dataset/mevis` and so on, sorted by key.
    """
    counts: Counter[str] = Counter()
    for task, option, target, dataset in rows:
        counts[task] += 1
        counts[f"{task}/{target}"] += 1
        if task == "aks":
            counts[f"aks/{option}"] += 1
        counts[f"dataset/{dataset}"] += 1
    return dict(sorted(counts.items()))


def ratios_of(counts: Mapping[str, int]) -> dict[str, float | None]:
    """Return the ratios `ktg single:multi` and `aks A:B`; None if the second count is 0."""
    pairs = {
        "ktg single:multi": ("ktg/single", "ktg/multi"),
        "aks A:B": ("aks/A", "aks/B"),
    }
    return {
        name: counts.get(a, 0) / counts[b] if counts.get(b) else None
        for name, (a, b) in pairs.items()
        if counts.get(a) or counts.get(b)
    }
