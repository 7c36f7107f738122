"""From a recipe's file and the command line's overrides to a checked `Recipe`.

Order of precedence, lowest first: the file named by `extends` (to any depth), the file itself,
`key.path=value` overrides. In each of these, the keys of the shared `grpo` section stand for both
`grpo_aks` and `grpo_ktg`, and those of the two for themselves. An unknown key, at any depth, is an
error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe
from rcot_rl.recipe.source import NOT_YAML, Key, Source, read_yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
_REPLACED: frozenset[Key] = frozenset({("data", "sets")})
"""Names of the user's own: a recipe that gives some means all of them, its parent's are gone."""

_SHARED = {"grpo": ("grpo_aks", "grpo_ktg")}
_QUOTES = tuple("'\"|>!&")
"""Starts of a YAML text that stands for another one."""
_Model = TypeVar("_Model", bound=BaseModel)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe.

    name_or_path: a YAML file, or the name of one under recipes/.
    overrides: `key.path=value`, values in YAML.
    Raises InputError with file, line and key.
    """
    source = _read_with_parents(_find(name_or_path), ())
    given = Source({})
    for text in overrides:
        given = given.merge(_override(text))
    return _validate(source.merge(_spread_shared(given)), Recipe)


def recipe_hash(recipe: BaseModel) -> str:
    """sha256 of the resolved recipe as canonical JSON: what was run, whatever file said it."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def dump_recipe(recipe: BaseModel) -> str:
    """The resolved recipe as YAML: what makes the run."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def dump_for_driver(recipe: Recipe) -> str:
    """The same, with what the driver on another host does about failures and lost hosts."""
    values = recipe.model_dump(mode="json")
    values["supervise"] = recipe.supervise.model_dump(mode="json")
    values["launch"] = {"health": recipe.launch.health.model_dump(mode="json")}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    shipped = RECIPES / f"{name_or_path}.yaml"
    if shipped.is_file():
        return shipped
    known = sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.glob("*.yaml"))
    raise InputError(f"no such recipe (shipped: {', '.join(known)})", file=str(name_or_path))


def _read_with_parents(path: Path, below: tuple[Path, ...]) -> Source:
    path = path.resolve()
    if path in below:
        chain = " -> ".join(p.name for p in (*below, path))
        raise InputError(f"extends itself: {chain}", file=path, key="extends")
    source = read_yaml(path)
    parent = source.tree.pop("extends", None)
    if parent is None:
        return _spread_shared(source)
    if not isinstance(parent, str):
        raise InputError("must be the path of a recipe", file=path, key="extends")
    parent_path = path.parent / parent
    if not parent_path.is_file() and "/" not in parent:
        parent_path = RECIPES / Path(parent).with_suffix(".yaml")  # a shipped one, from anywhere
    if not parent_path.is_file():
        line = source.places[("extends",)][1]
        raise InputError(f"no such recipe: {parent}", file=path, line=line, key="extends")
    inherited = _read_with_parents(parent_path, (*below, path))
    return inherited.merge(_spread_shared(source), _REPLACED)


def _override(text: str) -> Source:
    where = "command line"
    dotted, equals, value_text = text.partition("=")
    if not equals or not dotted:
        raise InputError(f"'{text}' is not key.path=value", file=where)
    try:
        value = yaml.safe_load(value_text)
    except NOT_YAML as error:
        raise InputError(f"'{value_text}' is not a YAML value", file=where, key=dotted) from error
    plain = isinstance(value, str) and value_text[:1] not in _QUOTES
    if plain and value.split() != value_text.split():
        # YAML takes ' #' for a comment: a path would silently become another one
        message = f"YAML reads '{value_text}' as '{value}'; put the value in quotes"
        raise InputError(message, file=where, key=dotted)
    keys = dotted.split(".")
    tree: Any = value
    for key in reversed(keys):
        tree = {key: tree}
    places: dict[Key, tuple[str, int | None]] = {
        tuple(keys[: end + 1]): (where, None) for end in range(len(keys))
    }
    return Source(tree, places)


def _spread_shared(source: Source) -> Source:
    tree, places = dict(source.tree), dict(source.places)
    for shared, targets in _SHARED.items():
        section = tree.pop(shared, None)
        if section is None:
            continue
        if not isinstance(section, dict):
            file, line = source.place((shared,))
            raise InputError("must be a mapping", file=file, line=line, key=shared)
        moved = {k: v for k, v in source.places.items() if k[:1] == (shared,)}
        for target in targets:
            own = tree.get(target)
            base = Source({target: section})
            tree[target] = base.merge(Source({target: own or {}})).tree[target]
            for key, place in moved.items():
                places.setdefault((target, *key[1:]), place)
    return Source(tree, places)


def _validate(source: Source, model: type[_Model]) -> _Model:
    _refuse_unknown(source, source.tree, model, ())
    try:
        return model.model_validate(source.tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = tuple(first["loc"])
        file, line = source.place(key)
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        if first["type"] != "missing" and not isinstance(first["input"], dict):
            message += f" (is {first['input']!r})"
        more = len(error.errors()) - 1
        if more:
            message += f"; and {more} more"
        raise InputError(message, file=file, line=line, key=".".join(map(str, key))) from error


def _refuse_unknown(source: Source, value: Any, annotation: Any, key: Key) -> None:
    model = _section_of(annotation)
    if model is not None and isinstance(value, dict):
        for name, child in value.items():
            if name not in model.model_fields:
                _unknown(source, (*key, name), list(model.model_fields))
            _refuse_unknown(source, child, model.model_fields[name].annotation, (*key, name))
        return
    arguments = typing.get_args(annotation)
    if isinstance(value, list) and typing.get_origin(annotation) is list:
        for index, child in enumerate(value):
            _refuse_unknown(source, child, arguments[0], (*key, index))
    elif isinstance(value, dict) and typing.get_origin(annotation) is dict:
        for name, child in value.items():
            _refuse_unknown(source, child, arguments[1], (*key, name))


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [_section_of(a) for a in typing.get_args(annotation)]
        return next((f for f in found if f is not None), None)
    return None


def _unknown(source: Source, key: Key, known: list[str]) -> typing.NoReturn:
    file, line = source.place(key)
    if len(key) == 1:
        known = [*known, *_SHARED]
    near = difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.0)
    parent = ".".join(map(str, key[:-1]))
    nearest = f"{parent}.{near[0]}" if parent else near[0]
    raise InputError(
        f"unknown key; the nearest known one is {nearest}",
        file=file,
        line=line,
        key=".".join(map(str, key)),
    )
