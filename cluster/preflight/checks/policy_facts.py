"""The base policy in numbers, from its files alone: `config.json`, and the headers of its weights.

`parameters_of` is the sum over the layers of Qwen2.5-VL as transformers builds it. Of the two
models that the paper names, the shapes are published, so that estimates can be made where the files
are not. Left out: downloading anything.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import TINY, weight_shapes

_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "patch_size": 14, "temporal_patch_size": 2, "in_channels": 3, "spatial_merge_size": 2,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "intermediate_size": 11008, "vocab_size": 151936,
        "tie_word_embeddings": True, "max_position_embeddings": 128000,
        "vision_config": {**_VISION, "out_hidden_size": 2048},
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
        "tie_word_embeddings": False, "max_position_embeddings": 128000,
        "vision_config": {**_VISION, "out_hidden_size": 3584},
    },
}  # fmt: skip
"""The `config.json` of hub models, as far as it matters here."""


@dataclass(frozen=True)
class PolicyFacts:
    """What is known of a policy."""

    spec: str
    folder: Path | None
    """Where it lies; None: not on this host."""
    hub_id: bool
    """Whether `spec` can only mean a model of the hub."""
    shape: dict[str, Any] | None
    """Its network's sizes, flat, `vision_config` below; None: unknown."""
    parameters: int | None
    derivation: str
    """Where the number of parameters is from."""


def policy_facts(spec: str) -> PolicyFacts:
    """Of `tiny`, a folder or a hub id. Raises nothing: `check_model` says what is wrong."""
    folder, hub_id = _folder(spec)
    if folder is None:
        shape = PUBLISHED.get(spec)
        known = parameters_of(shape) if shape else None
        source = f"the published shapes of {spec}" if shape else "unknown: not on this host"
        return PolicyFacts(spec, None, hub_id, shape, known, source)
    shape = _shape(folder)
    try:
        parameters = sum(prod(s) for s in weight_shapes(folder).values())
        source = "the headers of its weights"
    except InputError:
        parameters = parameters_of(shape) if shape else None
        source = "the sizes in its config.json" if shape else "unknown: no readable config.json"
    return PolicyFacts(spec, folder, hub_id, shape, parameters, source)


def parameters_of(shape: dict[str, Any]) -> int:
    """Parameters of a Qwen2.5-VL of this shape, tied embeddings counted once."""
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
    """Where it lies, and whether it is a hub id: the rules of `find_model`, without the network."""
    if spec == "tiny":
        return TINY, False
    path = Path(spec)
    if path.exists() or path.is_absolute() or spec.startswith(".") or spec.count("/") != 1:
        return (path if path.is_dir() else None), False
    return cached(spec), True


def cached(hub_id: str) -> Path | None:
    """The newest snapshot of the hub's cache; importing its library would take most of a second."""
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
            "temporal_patch_size": 2, "in_channels": 3, "spatial_merge_size": 2,
        } | shape["vision_config"]  # fmt: skip
        parameters_of(shape)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        return None
    return shape
