"""Reward recipes: YAML in, one checked and hashable `Recipe` or `RoutedRecipe` out.

A recipe names a task, what its modules share, and its components:

    task: ktg
    canvas: 840
    components:
      format:   {module: format, weight: 1.0}
      accuracy: {module: hungarian_match, weight: 1.0, gamma_box: 10}

or routes rows to recipes by their `data_source`:

    routes:
      rcot/aks: aks
      rcot/ktg: {extends: ktg, zero_target: true}
    canvas: 840        # optional: for all routes

`extends: NAME_OR_PATH` starts from another recipe: mappings are merged, anything else is replaced,
null takes a key out, and a component that names another module starts afresh. A path is relative
to the file that names it. `recipes/rewards/` holds the shipped ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, SerializeAsAny, ValidationError

from rcot_rl.errors import InputError
from rcot_rl.recipe.base import Section
from rcot_rl.recipe.source import NOT_YAML, yaml_fault
from rcot_rl.suggestions import did_you_mean
from reward_fns.registry import NonNegative, RewardModule, Settings, modules

SHIPPED = Path(__file__).resolve().parents[1] / "recipes" / "rewards"
VERSION = 1
"""Part of every hash: raised when the same recipe comes to mean another reward."""


class Component(Section):
    """One component: what it is called in metrics, its module and its weight."""

    module: str
    """A registered module."""
    weight: NonNegative = 1.0
    """Its factor in the reward."""
    params: SerializeAsAny[Section]
    """The module's own parameters; in YAML they stand beside `module` and `weight`."""


class Recipe(Settings):
    """One reward."""

    description: str = ""
    """For people; no part of the hash."""
    components: dict[str, Component]
    """By name, in the order in which they are summed."""


class RoutedRecipe(Section):
    """One reward for each `data_source`."""

    description: str = ""
    routes: dict[str, Recipe]


def recipe_hash(recipe: Recipe | RoutedRecipe) -> str:
    """sha256 of all that decides the reward; equal for recipes that resolve to the same."""
    content = recipe.model_dump(mode="json")
    for part in (content, *content.get("routes", {}).values()):
        part.pop("description", None)
    text = json.dumps({"version": VERSION, "recipe": content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load_recipe(
    name_or_path: str,
    *,
    canvas: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe | RoutedRecipe:
    """The recipe of that shipped name, or in that YAML file, resolved.

    overrides: dotted keys (or nested mappings) to values, applied after `extends`; canvas: the
    side of the image in pixels, for all routes. Raises InputError with file and key.
    """
    path = _find(name_or_path)
    raw = _resolve(_read(path), path, (path,))
    for key, value in (overrides or {}).items():
        raw = _merge(raw, _nested(key, value), path)
    if "routes" not in raw:
        return _recipe(raw, path, "", canvas)
    return _routed(raw, path, canvas)


def _find(name_or_path: str, base: Path | None = None) -> Path:
    path = Path(name_or_path)
    known = {p.stem: p for p in sorted(SHIPPED.glob("*.yaml"))}
    if path.suffix in (".yaml", ".yml"):
        path = path if base is None else base / path
        if not path.is_file():
            beside = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
            hint = did_you_mean(path.name, beside) or did_you_mean(path.stem, known)
            raise InputError(f"no such reward recipe{hint}", file=path)
        return path
    if name_or_path not in known:
        hint = did_you_mean(name_or_path, known)
        raise InputError(f"no such reward{hint} (known: {', '.join(known)})", key=name_or_path)
    return known[name_or_path]


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", file=path) from error
    except NOT_YAML as error:
        message, line = yaml_fault(error)
        raise InputError(message, file=path, line=line) from error
    if not isinstance(raw, dict):
        raise InputError("must be a mapping", file=path)
    return raw


def _resolve(raw: dict[str, Any], path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """`raw` on top of what it extends, with every route written out as a mapping."""
    raw = dict(raw)
    parent = raw.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise InputError("must be a name or a path", file=path, key="extends")
        origin = _find(parent, path.parent)
        if origin.resolve() in [p.resolve() for p in chain]:
            raise InputError(f"comes back to {origin.name}", file=path, key="extends")
        raw = _merge(_resolve(_read(origin), origin, (*chain, origin)), raw, path)
    routes = raw.get("routes")
    if isinstance(routes, dict):
        raw["routes"] = {
            source: _resolve({"extends": route} if isinstance(route, str) else route, path, chain)
            if isinstance(route, (str, dict))
            else route
            for source, route in routes.items()
        }
    return raw


def _merge(base: dict[str, Any], top: Mapping[str, Any], path: Path) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(old, dict):
            other_module = value.get("module", old.get("module")) != old.get("module")
            merged[key] = dict(value) if other_module else _merge(old, value, path)
        else:
            merged[key] = value
    return merged


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _routed(raw: dict[str, Any], path: Path, canvas: int | None) -> RoutedRecipe:
    routes = raw["routes"]
    _known(raw, {*RoutedRecipe.model_fields, "canvas"}, path, "")
    if canvas is None:
        canvas = raw.get("canvas")
    if not isinstance(routes, dict) or not routes:
        raise InputError("must map data sources to recipes", file=path, key="routes")
    resolved = {}
    for source, route in routes.items():
        key = f"routes.{source}"
        if not isinstance(route, dict):
            raise InputError("must be a recipe's name, path or mapping", file=path, key=key)
        resolved[source] = _recipe(route, path, f"{key}.", canvas)
    description = raw.get("description", "")
    return _validated(RoutedRecipe, {"description": description, "routes": resolved}, path, "")


def _recipe(raw: dict[str, Any], path: Path, prefix: str, canvas: int | None) -> Recipe:
    _known(raw, set(Recipe.model_fields), path, prefix)
    components = raw.get("components")
    if not isinstance(components, dict) or not components:
        raise InputError("must map names to modules", file=path, key=f"{prefix}components")
    settings = {key: value for key, value in raw.items() if key != "components"}
    if canvas is not None:
        settings["canvas"] = canvas
    task = settings.get("task")
    built = {
        name: _component(part, task, path, f"{prefix}components.{name}")
        for name, part in components.items()
    }
    return _validated(Recipe, {**settings, "components": built}, path, prefix)


def _component(raw: Any, task: Any, path: Path, key: str) -> Component:
    if not isinstance(raw, dict) or "module" not in raw:
        raise InputError("must be a mapping with the key 'module'", file=path, key=key)
    module = _module(raw["module"], task, path, f"{key}.module")
    own = {k: v for k, v in raw.items() if k not in ("module", "weight")}
    _known(own, set(module.params.model_fields), path, f"{key}.", frozenset({"module", "weight"}))
    params = _validated(module.params, own, path, f"{key}.")
    fields = {k: raw[k] for k in ("module", "weight") if k in raw}
    return _validated(Component, {**fields, "params": params}, path, f"{key}.")


def _module(name: Any, task: Any, path: Path, key: str) -> RewardModule:
    known = modules()
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(name, known)
        raise InputError(
            f"no such module {name!r}{hint} (known: {', '.join(known)})", file=path, key=key
        )
    if isinstance(task, str) and task not in known[name].tasks:
        serves = ", ".join(sorted(known[name].tasks))
        raise InputError(f"{name} serves {serves}, not {task}", file=path, key=key)
    return known[name]


def _known(
    raw: Mapping[str, Any],
    names: set[str],
    path: Path,
    prefix: str,
    also: frozenset[str] = frozenset(),
) -> None:
    known = sorted(names | also)
    faults = [
        InputError(
            f"unknown key{did_you_mean(key, known)} (known: {', '.join(known)})",
            file=path,
            key=f"{prefix}{key}",
        )
        for key in raw
        if key not in names
    ]
    if faults:
        raise InputError.of_all(faults)


def _validated(model: type[BaseModel], data: Any, path: Path, prefix: str) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = [
            InputError(e["msg"], file=path, key=prefix + ".".join(map(str, e["loc"])))
            for e in error.errors()
        ]
        raise InputError.of_all(faults) from error
