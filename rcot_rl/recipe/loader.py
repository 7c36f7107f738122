"""From a recipe's file and the command line's overrides to a checked `Recipe`.

Order of precedence, lowest first: the file named by `extends` (to any depth), the file itself,
`key.path=value` overrides. The override `extends=BASE` puts another recipe below the file instead
of the one that it extends. In each of these layers, the keys of `grpo` are given to every GRPO
stage of `train` that the layer or a lower one has, and a stage's own keys win over them. Then
`like: STAGE` copies settings from one stage to another.

All faults of a recipe are reported together. An unknown key, at any depth, is one of them; a known
key that is close is suggested.
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
from pydantic.fields import FieldInfo

from rcot_rl.errors import InputError
from rcot_rl.recipe.layers import Shipped, read_layers, read_overrides
from rcot_rl.recipe.schema import Recipe
from rcot_rl.recipe.source import Key, MergeRules, Source
from rcot_rl.suggestions import MOST, did_you_mean, is_initials, nearest

RECIPES = Shipped(Path(__file__).resolve().parents[2] / "recipes", "recipe")
_REPLACED: frozenset[Key] = frozenset({("data", "sets")})
"""Names of the user's own: a recipe that gives some means all of them, its parent's are gone."""

_EXTENDS = "extends"
_LIKE = "like"
"""In a stage of `train`: another stage, whose settings this one has besides its own."""

_PLACE = ("after", "reference")
"""Keys that say where a stage is in the chain; `like` does not copy them."""

_GRPO = "grpo"
"""The section with defaults of every GRPO stage, and the kind of those stages."""

FORMER_SECTIONS = {"sft": "train.sft", "grpo_aks": "train.grpo-aks", "grpo_ktg": "train.grpo-ktg"}
"""Sections of earlier versions, which had three fixed stages, and where their keys are now."""

_Model = TypeVar("_Model", bound=BaseModel)
_MOST_FAULTS = 100
"""Faults of one recipe that are listed."""


def load_recipe(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    stages: Sequence[str] | None = None,
) -> Recipe:
    """Return the resolved recipe.

    Args:
        name_or_path: A YAML file, or the name of one under recipes/.
        overrides: `key.path=value`, values in YAML; `extends=BASE` replaces the file's `extends`.
        stages: Stages whose batches have to suit the ranks. None: the recipe's.

    Raises:
        InputError: Every fault, each with file, line and key.
    """
    return resolve_recipe(name_or_path, overrides, stages)[0]


def resolve_recipe(
    name_or_path: str | Path, overrides: Sequence[str] = (), stages: Sequence[str] | None = None
) -> tuple[Recipe, Source]:
    """Return the resolved recipe and the merged tree of what was given, with every value's place.

    Arguments and errors are those of `load_recipe`.
    """
    path = RECIPES.find(name_or_path)
    source, given = Source({}), read_overrides(overrides)
    base = given.tree.pop(_EXTENDS, None)
    if not isinstance(base, str | None):
        message = "must be the name or the path of a recipe"
        raise InputError(message, file="command line", key=_EXTENDS)
    for layer in read_layers(path, RECIPES, base=base):
        source = _add_layer(source, layer, _REPLACED)
    source = _copy_settings(_add_layer(source, given))
    source.tree.pop(_GRPO, None)
    recipe = _validate(source, Recipe)
    faults = recipe.faults()
    if not faults:
        faults = recipe.batch_faults(recipe.stages if stages is None else stages)
    if faults:
        errors = {str(e): e for e in (_fault(source, *fault, path) for fault in faults)}
        raise InputError.of_all(list(errors.values()))
    return recipe, source


def _fault(source: Source, key: Key, message: str, path: Path) -> InputError:
    file, line = source.place(key)
    return InputError(message, file=file or path, line=line, key=source.name(key))


def require(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise InputError if a stage is unknown, or has batches that its ranks cannot share."""
    unknown = next((s for s in stages if s not in recipe.order), None)
    if unknown is not None:
        hint = did_you_mean(unknown, recipe.order)
        raise InputError(f"'{unknown}' is none of the stages {', '.join(recipe.order)}{hint}")
    faults = recipe.batch_faults(stages)
    if faults:
        raise InputError.of_all([InputError(m, key=".".join(key)) for key, m in faults])


def _add_layer(below: Source, layer: Source, names: frozenset[Key] = frozenset()) -> Source:
    """Merge a layer over the ones below it; the defaults of GRPO stages stay under `grpo`.

    Args:
        below: The lower layers, merged.
        layer: The layer.
        names: Mappings that the layer replaces as a whole.
    """
    defaults, stages = _section(layer, _GRPO), _section(layer, "train")
    former: dict[str, Any] = below.tree.get("train", {})
    for name, values in stages.items():
        if values is None and name not in former:
            file, line = layer.place(("train", name))
            message = f"no such stage to remove{did_you_mean(str(name), former)}"
            raise InputError(message, file=file, line=line, key=f"train.{name}")
    rules = MergeRules(
        names,
        restart=lambda key: ("kind", _LIKE) if key[:-1] == ("train",) else (),
        removable=lambda key: key[:-1] == ("train",),
    )
    every = below.merge(layer, rules)  # with the defaults of all layers so far
    spread = Source({})
    for name, values in every.tree.get("train", {}).items():
        known, given = former.get(name, {}), stages.get(name, {})
        if not isinstance(values, dict):
            continue
        if _LIKE in values:
            # it copies what the other stage is given; of its own, lower layers' keys are overridden
            shared = {k: v for k, v in defaults.items() if isinstance(known, dict) and k in known}
        elif values.get("kind") == _GRPO:
            inherits = isinstance(known, dict) and known.get("kind") == _GRPO
            # a stage that is new here gets the defaults of lower layers too
            shared = defaults if inherits else every.tree.get(_GRPO, {})
        else:
            continue
        missing = _without(shared, given if isinstance(given, dict) else {})
        section = Source({"train": {name: missing}})
        _spread_places(every, missing, (_GRPO,), ("train", name), section)
        spread = spread.merge(section)
    return every.merge(spread)


def _copy_settings(source: Source) -> Source:
    """Replace `like` of each stage by the settings of the stage that it names. Raises InputError.

    A stage's own keys win. The stages keep their order.
    """
    given, stages = source, source.tree.get("train", {})
    settled: dict[str, dict[str, Any]] = {}
    for name in stages:
        for each in reversed(_like_chain(given, name)):
            values = stages[each]
            if each in settled or not isinstance(values, dict) or _LIKE not in values:
                continue
            other = values[_LIKE]
            copied = settled.get(other, stages[other])
            copied = {k: v for k, v in copied.items() if k not in _PLACE}
            missing = _without(copied, values)
            section = Source({"train": {each: missing}})
            _spread_places(source, missing, ("train", other), ("train", each), section)
            source = source.merge(section)
            settled[each] = source.tree["train"][each]
    for settings in settled.values():
        settings.pop(_LIKE)
    return source


def _like_chain(source: Source, name: str) -> list[str]:
    """Return a stage and the stages that it is like, to any depth. Raises InputError."""
    stages, chain = source.tree["train"], [name]
    while isinstance(stages[chain[-1]], dict) and _LIKE in stages[chain[-1]]:
        key = ("train", chain[-1], _LIKE)
        file, line = source.place(key)
        values, other = stages[chain[-1]], stages[chain[-1]][_LIKE]
        message = ""
        if not isinstance(other, str) or other not in stages:
            message = f"'{other}' is not a stage of train{did_you_mean(str(other), stages)}"
        elif not isinstance(stages[other], dict):
            message = f"'{other}' is no mapping of settings"
        elif other in chain:
            message = f"circular: {' -> '.join([*chain, other])}"
        elif "kind" in values:
            message = "copies the kind too; remove `kind` or `like`"
        if message:
            raise InputError(message, file=file, line=line, key=".".join(key))
        chain.append(other)
    return chain


def _without(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the values that `given` does not have, key by key."""
    rest: dict[str, Any] = {}
    for key, value in values.items():
        other = given.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            rest[key] = _without(value, other)
        elif key not in given:
            rest[key] = value
    return rest


def _section(source: Source, key: str) -> dict[str, Any]:
    """Return a section of the tree, empty if it is missing. Raises InputError for no mapping."""
    section = source.tree.get(key)
    if section is None and key not in source.tree:
        return {}
    if not isinstance(section, dict):
        file, line = source.place((key,))
        raise InputError("must be a mapping", file=file, line=line, key=key)
    return section


def _spread_places(source: Source, values: Any, at: Key, to: Key, out: Source) -> None:
    """Note in `out` that the keys below `to` were given below `at` of `source`."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if (*at, name) in source.places:
            out.places[(*to, name)] = source.places[(*at, name)]
            out.typed[(*to, name)] = source.typed.get((*at, name), (*at, name))
        _spread_places(source, value, (*at, name), (*to, name), out)


def recipe_hash(recipe: BaseModel) -> str:
    """Return the sha256 of the resolved recipe as canonical JSON.

    Two recipes that resolve to the same values have the same hash, whatever their files look like.
    The order of keys does not count, except that of the stages of `train`.
    """
    values = recipe.model_dump(mode="json")
    if isinstance(values.get("train"), dict):
        values["train"] = list(values["train"].items())
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
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


def _validate(source: Source, model: type[_Model]) -> _Model:
    unknown = dict(_unknown_keys(source.tree, model, ()))
    faults = [_unknown(source, key, section) for key, section in unknown.items()]
    # a misspelt key is not missing too
    meant = {(*k[:-1], nearest(str(k[-1]), s.model_fields)) for k, s in unknown.items()}
    if any(key[0] in FORMER_SECTIONS for key in unknown):
        meant.add(("train",))
    result: _Model | None = None
    try:
        result = model.model_validate(source.tree)
    except ValidationError as error:
        faults += [
            _invalid(source, e)
            for e in error.errors()
            # the second one follows from another fault, which is listed itself
            if e["type"] not in ("extra_forbidden", "default_factory_not_called")
            and not (e["type"] == "missing" and _untagged(source, e["loc"]) in meant)
        ]
    if faults:
        # a fault of the section `grpo` was found in every stage that it is given to
        distinct = list({str(fault): fault for fault in faults}.values())
        if len(distinct) > _MOST_FAULTS:
            distinct[_MOST_FAULTS:] = [InputError(f"{len(distinct) - _MOST_FAULTS} further faults")]
        raise InputError.of_all(distinct)
    assert result is not None  # every error of pydantic's is a fault
    return result


def _untagged(source: Source, location: Key) -> Key:
    """Return pydantic's location of a fault without the kind of stage, which it puts in between."""
    if location[0] == "train" and len(location) > 2:
        return (*location[:2], *location[3:])
    return tuple(location)


def _invalid(source: Source, error: Any) -> InputError:
    key = _untagged(source, error["loc"])
    file, line = source.place(key)
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if error["type"] == "union_tag_not_found":
        others = [name for name in source.tree["train"] if name != key[-1]]
        hint = did_you_mean(str(key[-1]), others, "train.")
        key, message = (*key, "kind"), f"missing; sft or grpo{hint}"
    elif error["type"] == "union_tag_invalid":
        key, message = (*key, "kind"), f"must be sft or grpo (is {error['ctx']['tag']!r})"
        file, line = source.place(key)
    elif error["type"] != "missing" and not isinstance(error["input"], dict):
        message += f" (is {error['input']!r})"
    if error["type"] == "literal_error":
        message += did_you_mean(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    return InputError(message, file=file, line=line, key=source.name(key))


def _unknown_keys(value: Any, annotation: Any, key: Key) -> Iterator[tuple[Key, type[BaseModel]]]:
    """Keys that are none of the schema's, each with the section that it is in."""
    model = _section_for(value, annotation)
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


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a value of this type can be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return _sections_of(arguments[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [section for a in arguments for section in _sections_of(a)]
    return []


def _section_for(value: Any, annotation: Any) -> type[BaseModel] | None:
    """Return the section of this type that a mapping is, by its `kind` if there are several."""
    sections = _sections_of(annotation)
    if len(sections) > 1 and isinstance(value, dict):
        sections = [s for s in sections if _kind_of(s.model_fields["kind"]) == value.get("kind")]
    return sections[0] if sections else None


def _kind_of(field: FieldInfo) -> str:
    return str(typing.get_args(field.annotation)[0])


def _unknown(source: Source, key: Key, model: type[BaseModel]) -> InputError:
    file, line = source.place(key)
    name, given = str(key[-1]), source.name(key)
    parent = given.rpartition(".")[0]
    if key[0] in FORMER_SECTIONS and len(key) == 1:
        now = FORMER_SECTIONS[name]
        message = (
            f"is now `{now}` (`train:` maps each stage's name to `kind: sft` or `kind: grpo` and "
            "its settings)"
        )
        return InputError(f"unknown key: {message}", file=file, line=line, key=given)
    known = [*model.model_fields, *(() if parent else (_GRPO,))]
    below = [] if parent else _below(model, name)
    if below:
        hint = f"; did you mean {' or '.join(below)}?"
    else:
        hint = did_you_mean(name, known, f"{parent}." if parent else "")
    if not hint:
        hint = f"; known {'here' if parent else 'sections'}: {', '.join(known)}"
    return InputError(f"unknown key{hint}", file=file, line=line, key=given)


def _below(model: type[BaseModel], name: str) -> list[str]:
    """Return the keys one section below `model` that are called `name` or have these initials.

    Keys of GRPO stages are named as keys of `grpo`. Empty if there are more than three.
    """
    close = []
    for section, field in model.model_fields.items():
        for prefix, inside in _named_sections(section, field.annotation):
            for key in inside.model_fields:
                if key == name or is_initials(name, key):
                    close.append(f"{prefix}.{key}")
    close = list(dict.fromkeys(close))
    return close if len(close) <= MOST else []


def _named_sections(name: str, annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (prefix of its keys, section) for a field of the recipe."""
    if typing.get_origin(annotation) is dict:
        for inside in _sections_of(typing.get_args(annotation)[1]):
            if "kind" in inside.model_fields:
                kind = _kind_of(inside.model_fields["kind"])
                yield (kind if kind == _GRPO else f"{name}.<{kind} stage>"), inside
    for inside in _sections_of(annotation):
        yield name, inside
