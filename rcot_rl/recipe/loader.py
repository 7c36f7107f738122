"""From a recipe's file and the command line's overrides to a checked `Recipe`.

Order of precedence, lowest first: the file named by `extends` (to any depth), the file itself,
`key.path=value` overrides. In each of these, the keys of the shared `grpo` section stand for both
`grpo_aks` and `grpo_ktg`, and those of the two for themselves. All faults of a recipe are reported
together. An unknown key, at any depth, is one of them; a known key that is close is suggested.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import GRPO_STAGES, STAGES, Recipe, section_key
from rcot_rl.recipe.source import NOT_YAML, Key, Source, read_yaml
from rcot_rl.recipe.training import GrpoSection
from rcot_rl.suggestions import MOST, did_you_mean, is_initials, nearest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
_REPLACED: frozenset[Key] = frozenset({("data", "sets")})
"""Names of the user's own: a recipe that gives some means all of them, its parent's are gone."""

_SHARED = {"grpo": ("grpo_aks", "grpo_ktg")}
_QUOTES = tuple("'\"|>!&")
"""Starts of a YAML text that stands for another one."""
_Model = TypeVar("_Model", bound=BaseModel)
_MOST_FAULTS = 100
"""Faults of one recipe that are listed."""


def load_recipe(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    needs: Sequence[str] | None = None,
) -> Recipe:
    """The resolved recipe.

    name_or_path: a YAML file, or the name of one under recipes/.
    overrides: `key.path=value`, values in YAML.
    needs: the stages whose sections the command reads; None: the recipe's own stages.
    Raises InputError with file, line and key.
    """
    return resolve_recipe(name_or_path, overrides, needs)[0]


def resolve_recipe(
    name_or_path: str | Path, overrides: Sequence[str] = (), needs: Sequence[str] | None = None
) -> tuple[Recipe, Source]:
    """Return the resolved recipe and the merged tree of what was given, with every value's place.

    Arguments and errors are those of `load_recipe`.
    """
    path = _find(name_or_path)
    source = _read_with_parents(path, ())
    given = Source({})
    for text in overrides:
        given = given.merge(_override(text))
    source = source.merge(_spread_shared(given))
    listed = source.tree.get("stages", STAGES)
    used = needs if needs is not None else listed if isinstance(listed, list | tuple) else STAGES
    recipe = _validate(source, Recipe, _unused(source, used))
    require(recipe, used, path)
    return recipe, source


def require(recipe: Recipe, stages: Sequence[str], file: Path | None = None) -> None:
    """Raise InputError if those stages read a section that is missing, or have batches that their
    ranks cannot share. file: the recipe's."""
    lacking = recipe.lacks(stages)
    if lacking:
        raise InputError.of_all([InputError(m, file=file, key=k) for k, m in lacking.items()])
    fault = recipe.batch_fault(stages)
    if fault is not None:
        raise InputError(fault, file=file)


def _unused(source: Source, used: Sequence[str]) -> set[str]:
    """GRPO sections that no stage of `used` reads, of which nothing but keys of the shared section
    is there, and not all that it must have."""
    must = {name for name, field in GrpoSection.model_fields.items() if field.is_required()}
    keys = set()
    for stage in GRPO_STAGES:
        key = section_key(stage)
        section = source.tree.get(key)
        if stage in used or not isinstance(section, dict) or must <= section.keys():
            continue
        if all((key, name) in source.typed for name in section):
            keys.add(key)
    return keys


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
    if path.is_file():
        return path
    known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    if path.suffix in (".yaml", ".yml"):
        raise InputError(f"no such file{_other_recipe(path)}", file=path)
    if str(name_or_path) in known:
        return RECIPES / f"{name_or_path}.yaml"
    hint = did_you_mean(name_or_path, known)
    raise InputError(f"no such recipe{hint} (shipped: {', '.join(known)})", file=str(name_or_path))


def _other_recipe(path: Path) -> str:
    """A suggestion in place of a file that is not there: a file beside it, or a shipped recipe."""
    folder = path.parent
    beside = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = nearest(path.name, [name for name in beside if name.endswith((".yaml", ".yml"))])
    if near is not None:
        return f"; did you mean {folder / near}?"
    return did_you_mean(path.stem, sorted(p.stem for p in RECIPES.glob("*.yaml")))


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
        hint = _other_recipe(path.parent / parent)
        raise InputError(f"no such recipe: {parent}{hint}", file=path, line=line, key="extends")
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
    tree, places, typed = dict(source.tree), dict(source.places), dict(source.typed)
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
                spread = (target, *key[1:])
                if spread not in places:
                    places[spread], typed[spread] = place, key
    return Source(tree, places, typed)


def _validate(source: Source, model: type[_Model], unused: set[str]) -> _Model:
    """unused: sections that are left out of the result, and in which nothing is missing."""
    unknown = dict(_unknown_keys(source.tree, model, ()))
    faults = [_unknown(source, key, section) for key, section in unknown.items()]
    # a misspelt key is not missing too
    meant = {(*k[:-1], nearest(str(k[-1]), s.model_fields)) for k, s in unknown.items()}
    result: _Model | None = None
    try:
        result = model.model_validate(source.tree)
    except ValidationError as error:
        faults += [
            _invalid(source, e)
            for e in error.errors()
            if e["type"] != "extra_forbidden"
            and not (e["type"] == "missing" and (e["loc"][0] in unused or tuple(e["loc"]) in meant))
        ]
    if faults:
        # a fault of the shared section was found once in each of the two that it stands for
        distinct = list({str(fault): fault for fault in faults}.values())
        if len(distinct) > _MOST_FAULTS:
            distinct[_MOST_FAULTS:] = [InputError(f"{len(distinct) - _MOST_FAULTS} further faults")]
        raise InputError.of_all(distinct)
    if result is None:
        left = {key: value for key, value in source.tree.items() if key not in unused}
        result = model.model_validate(left)
    return result


def _invalid(source: Source, error: Any) -> InputError:
    key = tuple(error["loc"])
    file, line = source.place(key)
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if error["type"] != "missing" and not isinstance(error["input"], dict):
        message += f" (is {error['input']!r})"
    if error["type"] == "literal_error":
        message += did_you_mean(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    return InputError(message, file=file, line=line, key=source.name(key))


def _unknown_keys(value: Any, annotation: Any, key: Key) -> Iterator[tuple[Key, type[BaseModel]]]:
    """Keys that are none of the schema's, each with the section that it is in."""
    model = _section_of(annotation)
    if model is not None and isinstance(value, dict):
        for name, child in value.items():
            if name in model.model_fields:
                inside = model.model_fields[name].annotation
                yield from _unknown_keys(child, inside, (*key, name))
            else:
                yield (*key, name), model
        return
    arguments = typing.get_args(annotation)
    if isinstance(value, list) and typing.get_origin(annotation) is list:
        for index, child in enumerate(value):
            yield from _unknown_keys(child, arguments[0], (*key, index))
    elif isinstance(value, dict) and typing.get_origin(annotation) is dict:
        for name, child in value.items():
            yield from _unknown_keys(child, arguments[1], (*key, name))


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [_section_of(a) for a in typing.get_args(annotation)]
        return next((f for f in found if f is not None), None)
    return None


def _unknown(source: Source, key: Key, model: type[BaseModel]) -> InputError:
    file, line = source.place(key)
    name, typed = str(key[-1]), source.name(key)
    parent = typed.rpartition(".")[0]
    known = [*model.model_fields, *(() if parent else _SHARED)]
    below = [] if parent else _below(model, name)
    if below:
        hint = f"; did you mean {' or '.join(below)}?"
    else:
        hint = did_you_mean(name, known, f"{parent}." if parent else "")
    if not hint:
        hint = f"; known {'here' if parent else 'sections'}: {', '.join(known)}"
    return InputError(f"unknown key{hint}", file=file, line=line, key=typed)


def _below(model: type[BaseModel], name: str) -> list[str]:
    """Keys one section below `model` that are called so, or have these initials; none if they are
    more than three. The shared sections stand for those that they are spread over."""
    close = []
    owners = {own: shared for shared, owned in _SHARED.items() for own in owned}
    for section, field in model.model_fields.items():
        inside = _section_of(field.annotation)
        for key in inside.model_fields if inside else ():
            if key == name or is_initials(name, key):
                close.append(f"{owners.get(section, section)}.{key}")
    close = list(dict.fromkeys(close))
    return close if len(close) <= MOST else []
