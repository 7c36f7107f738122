"""Reward recipes: from YAML to a validated, hashable `RewardRecipe` or `RoutedRecipe`.

A recipe names a task, the settings its modules share, and its components:

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

`extends: NAME_OR_PATH` starts from another recipe: mappings are merged, other values are replaced,
null removes a key, and a component that names another module inherits nothing. A path is relative
to the file that names it. `recipes/rewards/` holds the shipped recipes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SerializeAsAny, ValidationError

from rcot_rl.errors import InputError
from rcot_rl.protocol.parser import ResponseForm
from rcot_rl.recipe.base import Section
from rcot_rl.recipe.layers import Shipped, nested, parent_layers, read_layers
from rcot_rl.recipe.source import Key, MergeRules, Source
from rcot_rl.suggestions import did_you_mean
from reward_fns.registry import NonNegative, RewardModule, Settings, modules

REWARDS = Shipped(Path(__file__).resolve().parents[1] / "recipes" / "rewards", "reward recipe")
_RULES = MergeRules(restart=lambda key: ("module",), removable=lambda key: True)
_FORMATS: Mapping[ResponseForm, str] = {"think_answer": "format", "answer": "answer_format"}
"""Form of a response -> the module that pays for it."""
VERSION = 1
"""Part of every hash. Increment it when the same recipe yields other rewards than before."""


class Component(Section):
    """One component of a reward: a module, its weight and its parameters."""

    module: str
    """Name of a registered module."""
    weight: NonNegative = 1.0
    """Factor of the component in the reward."""
    params: SerializeAsAny[Section]
    """Parameters of the module; in YAML they are siblings of `module` and `weight`."""


class RewardRecipe(Settings):
    """A reward for one task."""

    description: str = ""
    """For people; not part of the hash."""
    components: dict[str, Component]
    """Components by their name in metrics, in the order in which they are summed."""

    @property
    def response(self) -> ResponseForm | None:
        """What its format component pays for; None without one (a public baseline has its own)."""
        forms = [form for form, module in _FORMATS.items() if module in self.modules]
        return forms[0] if len(forms) == 1 else None

    @property
    def modules(self) -> set[str]:
        """Names of the modules of its components."""
        return {component.module for component in self.components.values()}


class RoutedRecipe(Section):
    """One reward per `data_source`."""

    description: str = ""
    """For people; not part of the hash."""
    routes: dict[str, RewardRecipe]
    """Reward by `data_source`."""


def reward_hash(recipe: RewardRecipe | RoutedRecipe) -> str:
    """Return the sha256 of everything that decides the reward, after resolving the recipe."""
    content = recipe.model_dump(mode="json")
    for part in (content, *content.get("routes", {}).values()):
        part.pop("description", None)
    text = json.dumps({"version": VERSION, "recipe": content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load_reward_recipe(
    name_or_path: str,
    *,
    canvas: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RewardRecipe | RoutedRecipe:
    """Load and resolve a reward recipe.

    Args:
        name_or_path: Name of a shipped recipe, or a YAML file.
        canvas: Side of the image in pixels, for all routes.
        overrides: Dotted keys (or nested mappings) to values, applied after `extends`.

    Raises:
        InputError: The recipe is invalid; the error has file and key.
    """
    source = _resolved(REWARDS.find(name_or_path))
    for key, value in (overrides or {}).items():
        source = source.merge(nested(key, value), _RULES)
    if "routes" not in source.tree:
        return _recipe(source, (), canvas)
    return _routed(source, canvas)


def _resolved(path: Path, above: tuple[Path, ...] = ()) -> Source:
    """Read a reward recipe with all that it and its routes extend."""
    source = Source({})
    for layer in read_layers(path, REWARDS, above):
        file = Path(str(layer.places[()][0]))
        source = source.merge(layer, _RULES)
        routes = source.tree.get("routes")
        for name, route in routes.items() if isinstance(routes, dict) else ():
            if isinstance(route, str):
                parent, own = route, {}
            elif isinstance(route, dict) and "extends" in route:
                parent = route["extends"]
                own = {k: v for k, v in route.items() if k != "extends"}
            else:
                continue
            key: Key = ("routes", name)
            line, chain = source.place(key)[1], (*above, path.resolve(), file)
            expanded = Source({})
            for below in parent_layers(parent, file, line, REWARDS, chain, f"routes.{name}"):
                expanded = expanded.merge(below, _RULES)
            places = {k: v for k, v in source.places.items() if k[:2] == key}
            merged = expanded.under(key).merge(Source({"routes": {name: own}}, places), _RULES)
            source = source.merge(Source({"routes": {name: None}}), _RULES).merge(merged)
            source.tree["routes"] = {n: source.tree["routes"][n] for n in list(routes or ())}
    return source


def _routed(source: Source, canvas: int | None) -> RoutedRecipe:
    _known(source, source.tree, {*RoutedRecipe.model_fields, "canvas"}, ())
    routes = source.tree["routes"]
    if canvas is None:
        canvas = source.tree.get("canvas")
    if not isinstance(routes, dict) or not routes:
        raise _fault(source, ("routes",), "must be a mapping of data sources to recipes")
    resolved = {}
    for name, route in routes.items():
        if not isinstance(route, dict):
            raise _fault(source, ("routes", name), "must be a recipe name, a path or a mapping")
        resolved[name] = _recipe(source, ("routes", name), canvas)
    values = {"description": source.tree.get("description", ""), "routes": resolved}
    return _validated(source, RoutedRecipe, values, ())


def _recipe(source: Source, at: Key, canvas: int | None) -> RewardRecipe:
    raw: dict[str, Any] = source.tree
    for name in at:
        raw = raw[str(name)]
    _known(source, raw, set(RewardRecipe.model_fields), at)
    components = raw.get("components")
    if not isinstance(components, dict) or not components:
        raise _fault(source, (*at, "components"), "must be a mapping")
    settings = {key: value for key, value in raw.items() if key != "components"}
    if canvas is not None:
        settings["canvas"] = canvas
    task = settings.get("task")
    parts = {
        name: _component(source, part, task, (*at, "components", name))
        for name, part in components.items()
    }
    return _validated(source, RewardRecipe, {**settings, "components": parts}, at)


def _component(source: Source, raw: Any, task: Any, at: Key) -> Component:
    if not isinstance(raw, dict) or "module" not in raw:
        raise _fault(source, at, "must be a mapping with the key 'module'")
    module = _module(source, raw["module"], task, (*at, "module"))
    given = {k: v for k, v in raw.items() if k not in ("module", "weight")}
    also = frozenset({"module", "weight"})
    _known(source, given, set(module.params.model_fields), at, also)
    params = _validated(source, module.params, given, at)
    fields = {k: raw[k] for k in ("module", "weight") if k in raw}
    return _validated(source, Component, {**fields, "params": params}, at)


def _module(source: Source, name: Any, task: Any, at: Key) -> RewardModule:
    known = modules()
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(name, known)
        message = f"unknown module {name!r}{hint} (known: {', '.join(known)})"
        raise _fault(source, at, message)
    if isinstance(task, str) and task not in known[name].tasks:
        tasks = ", ".join(sorted(known[name].tasks))
        raise _fault(source, at, f"{name} scores the tasks {tasks}, not {task}")
    return known[name]


def _known(
    source: Source,
    raw: Mapping[str, Any],
    names: set[str],
    at: Key,
    also: frozenset[str] = frozenset(),
) -> None:
    known = sorted(names | also)
    faults = [
        _fault(
            source,
            (*at, key),
            f"unknown key{did_you_mean(key, known)} (known: {', '.join(known)})",
        )
        for key in raw
        if key not in names
    ]
    if faults:
        raise InputError.of_all(faults)


def _validated(source: Source, model: type[BaseModel], data: Any, at: Key) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = [_fault(source, (*at, *e["loc"]), e["msg"]) for e in error.errors()]
        raise InputError.of_all(faults) from error


def _fault(source: Source, key: Key, message: str) -> InputError:
    file, line = source.place(key)
    return InputError(message, file=file, line=line, key=source.name(key))
