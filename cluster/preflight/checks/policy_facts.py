"""Sizes of the base policy, from its `config.json` and the headers of its weights.

`parameters_of` sums over the layers of Qwen2.5-VL as transformers builds it. The shapes of the
paper's two models are known, so that estimates need no files. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import SHIPPED, is_hub_id, weight_shapes


def _qwen(
    hidden: int, layers: int, heads: int, kv: int, wide: int, words: int, *, tied: bool
) -> dict[str, Any]:
    """Return keys of a Qwen2.5-VL's config.json."""
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    patches = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": wide,
        "vocab_size": words,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 128000,
        "vision_config": {**vision, **patches, "in_channels": 3, "out_hidden_size": hidden},
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen(2048, 36, 16, 2, 11008, 151936, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen(3584, 28, 28, 4, 18944, 152064, tied=False),
}
"""Keys of the `config.json` of hub models that estimates need."""


@dataclass(frozen=True)
class PolicyFacts:
    """What is known about a policy."""

    spec: str
    folder: Path | None
    """Its folder; None if it is not on this host."""
    hub_id: bool
    """Whether `spec` can only mean a model of the hub."""
    shape: dict[str, Any] | None
    """Sizes of its network, flat, with `vision_config` nested; None if unknown."""
    parameters: int | None
    derivation: str
    """Source of the number of parameters."""


def policy_facts(spec: str) -> PolicyFacts:
    """Return what is known about `tiny`, a folder or a hub id; `check_model` reports faults."""
    folder, hub_id = _folder(spec)
    if folder is None:
        shape = PUBLISHED.get(spec)
        known = parameters_of(shape) if shape else None
        source = f"the published shapes of {spec}" if shape else "unknown: not on this host"
        return PolicyFacts(spec, None, hub_id, shape, known, source)
    shape = _shape(folder)
    parameters: int | None
    try:
        parameters = sum(prod(s) for s in weight_shapes(folder).values())
        source = "the headers of its weights"
    except InputError:
        parameters = parameters_of(shape) if shape else None
        source = "the sizes in its config.json" if shape else "unknown: no readable config.json"
    return PolicyFacts(spec, folder, hub_id, shape, parameters, source)


def parameters_of(shape: dict[str, Any]) -> int:
    """Return the parameters of a Qwen2.5-VL of this shape, with tied embeddings counted once."""
    h, i = shape["hidden_size"], shape["intermediate_size"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = 2 * h * h + h + 2 * (h * kv + kv) + 3 * h * i + 2 * h
    embeddings = shape["vocab_size"] * h * (1 if shape["tie_word_embeddings"] else 2)
    v = shape["vision_config"]
    d, m = v["hidden_size"], v["intermediate_size"]
    patches = v["in_channels"] * v["temporal_patch_size"] * v["patch_size"] ** 2 * d
    block = 3 * d * d + 3 * d + d * d + d + 3 * d * m + 2 * m + d + 2 * d
    wide = d * v["spatial_merge_size"] ** 2
    merger = d + wide * wide + wide + wide * v["out_hidden_size"] + v["out_hidden_size"]
    text = embeddings + shape["num_hidden_layers"] * layer + h
    return text + patches + v["depth"] * block + merger


def _folder(spec: str) -> tuple[Path | None, bool]:
    """Return a model's folder and whether it is a hub id, as `find_model` but without network."""
    if spec in SHIPPED:
        return SHIPPED[spec], False
    if is_hub_id(spec):
        return cached(spec), True
    return (Path(spec) if Path(spec).is_dir() else None), False


def cached(hub_id: str) -> Path | None:
    """Return the folder of a hub model in the cache; the hub's library takes a second to import."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / (
        "huggingface"
    )
    cache = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub"))
    model = cache / f"models--{hub_id.replace('/', '--')}"
    try:
        snapshot = model / "snapshots" / (model / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return snapshot if snapshot.is_dir() else None


def _shape(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or {}
        shape = {k: v for k, v in config.items() if k != "text_config"} | text
        shape.setdefault("tie_word_embeddings", False)
        shape["tie_word_embeddings"] = config.get(
            "tie_word_embeddings", shape["tie_word_embeddings"]
        )
        shape["vision_config"] = {
            "temporal_patch_size": 2,
            "in_channels": 3,
            "spatial_merge_size": 2,
        } | shape["vision_config"]
        parameters_of(shape)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        return None
    return shape
