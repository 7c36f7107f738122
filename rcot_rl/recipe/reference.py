"""Documentation of recipes: the key reference, and a resolved recipe with the origin of each value.

The key reference is generated from the schema; the meaning of a key is the string under its field.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe
from rcot_rl.recipe.source import Key, Source

_SHARED_GRPO = (
    "Defaults for all GRPO stages: any key of `train.<grpo>` except `kind`. Keys of a stage win."
)
_LIKE = (
    "Another stage of `train`: copy its kind and settings, except `after` and `reference`. Keys of "
    "the stage itself win."
)


@dataclass(frozen=True)
class KeyDoc:
    """A key of the recipe."""

    key: str
    """Dotted key; `[]` stands for an entry of a list and `<name>` for a user-defined name."""
    type: str
    default: str
    """In YAML, or `required`."""
    meaning: str


def recipe_keys(prefix: str = "") -> list[KeyDoc]:
    """Return the keys at or below `prefix`, in the schema's order.

    Raises:
        InputError: No key starts with `prefix`.
    """
    keys = list(_keys_of(Recipe, ""))
    keys.append(KeyDoc("train.<name>.like", "text", "null", _LIKE))
    keys.append(KeyDoc("grpo", "mapping", "{}", _SHARED_GRPO))
    wanted = prefix.strip(".")
    chosen = [d for d in keys if not wanted or _within(d.key, wanted)]
    if not chosen:
        raise InputError("no such key; `rcot recipe keys` lists all of them", key=wanted)
    return chosen


def _within(key: str, prefix: str) -> bool:
    plain = key.replace("[]", "").replace("<", "").replace(">", "")
    return any(k == prefix or k.startswith(f"{prefix}.") for k in (key, plain))


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[KeyDoc]:
    for name, field in section.model_fields.items():
        sections = list(_sections_below(field.annotation))
        meaning = field.description or ""
        if not meaning and len(sections) == 1:
            meaning = (sections[0][0].__doc__ or "").strip()
        key = f"{prefix}{name}"
        yield KeyDoc(key, _field_type(field), _default(field), " ".join(meaning.split()))
        for below, suffix in sections:
            yield from _keys_of(below, f"{key}{suffix}.")


def _sections_below(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield each section in values of `annotation`, with the suffix of its parent's key."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ""
        return
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        yield from ((below, "[]") for below, _ in _sections_below(arguments[0]))
    elif origin is dict:
        for below, _ in _sections_below(arguments[1]):
            kind = below.model_fields.get("kind")
            called = typing.get_args(kind.annotation)[0] if kind is not None else "name"
            yield below, f".<{called}>"
    elif origin is typing.Annotated:
        yield from _sections_below(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _sections_below(argument)


_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "multiple of"}


def _field_type(field: FieldInfo) -> str:
    bounds = [
        f"{word} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, word in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([type_name(field.annotation), *bounds])


def type_name(annotation: Any) -> str:
    """Return a type as it reads in YAML: `int`, `a | b`, `list of text`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_name(a) for a in arguments))
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"mapping of {type_name(arguments[1])}" if arguments[1] is not Any else "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    words: dict[Any, str] = {type(None): "null", str: "text", Any: "value", bool: "true | false"}
    return words.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory_takes_validated_data:
        return "see meaning"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return _flow(_plain(value)) if not isinstance(value, BaseModel) else "{}"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _flow(value: Any) -> str:
    """Return a value as one line of YAML."""
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()


def show(recipe: Recipe, source: Source) -> str:
    """Return a resolved recipe as YAML, with the origin of each value in a comment.

    The origin is a file and line, `command line`, or `default`. The text is a valid recipe.

    Args:
        recipe: The resolved recipe.
        source: The merged tree that it was validated from.
    """
    rows = list(_rows(recipe, (), source, 0))
    width = min(max(len(text) for text, _ in rows), 60)
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in rows)


def _rows(section: BaseModel, at: Key, source: Source, depth: int) -> Iterator[tuple[str, str]]:
    indent = "  " * depth
    for name in type(section).model_fields:
        value, key = getattr(section, name), (*at, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:", ""
            yield from _rows(value, key, source, depth + 1)
        elif isinstance(value, dict) and any(isinstance(v, BaseModel) for v in value.values()):
            yield f"{indent}{name}:", ""
            for child, below in value.items():
                yield f"{indent}  {_flow(child)}:", ""
                yield from _rows(below, (*key, child), source, depth + 2)
        elif isinstance(value, list) and any(isinstance(v, BaseModel) for v in value):
            yield f"{indent}{name}:", ""
            for i, below in enumerate(value):
                yield f"{indent}  - {_flow(_given(below))}", _origin((*key, i), source)
        else:
            dumped = section.model_dump(mode="json", include={name})[name]
            yield f"{indent}{name}: {_flow(dumped)}", _origin(key, source)


def _given(section: BaseModel) -> dict[str, Any]:
    """Return an entry of a list without its default values."""
    return section.model_dump(mode="json", exclude_defaults=True)


def _origin(key: Key, source: Source) -> str:
    node: Any = source.tree
    for part in key:
        children = dict(enumerate(node)) if isinstance(node, list) else node
        if not isinstance(children, dict) or part not in children:
            return "default"
        node = children[part]
    file, line = source.place(key)
    return "default" if file is None else file + (f":{line}" if line is not None else "")


def keys_page() -> str:
    """Return the key reference in Markdown: a table for each top-level key."""
    rows: dict[str, list[KeyDoc]] = {"Top level": []}
    for doc in recipe_keys():
        first, _, below = doc.key.partition(".")
        if below:
            rows.setdefault(first.removesuffix("[]"), []).append(doc)
        else:
            rows["Top level"].append(doc)
    parts = [
        "# Recipe keys\n\nGenerated from the schema by `make docs`. `[]` stands for an entry of a "
        "list, `<name>` for a\nuser-defined name. `rcot recipe keys PREFIX` prints the same.\n"
    ]
    for name, docs in rows.items():
        parts.append(f"## {name}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |")
        parts += [
            f"| `{d.key}` | {_cell(d.type)} | {'' if d.default == 'required' else '`'}"
            f"{_cell(d.default)}{'' if d.default == 'required' else '`'} | {_cell(d.meaning)} |"
            for d in docs
        ]
        parts.append("")
    return "\n".join(parts)


def _cell(text: str) -> str:
    """Escape a table cell; inside code spans, Markdown needs no escape for `<`."""
    spans = text.replace("|", "\\|").split("`")
    return "`".join(s if i % 2 else s.replace("<", "&lt;") for i, s in enumerate(spans))
