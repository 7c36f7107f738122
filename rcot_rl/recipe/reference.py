"""The recipe for people: every key with type, default and meaning, and a recipe's values' origins.

Both are read from the schema: the meaning of a key is the string under its field.
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
from rcot_rl.recipe.training import GrpoSection

_SHARED_GRPO = "Defaults of every GRPO stage."


@dataclass(frozen=True)
class KeyDoc:
    """One key of the recipe."""

    key: str
    """Dotted; `[]` stands for an entry of a list and `<name>` for a name of the user's."""
    type: str
    default: str
    """In YAML, or `required`."""
    meaning: str


def recipe_keys(prefix: str = "") -> list[KeyDoc]:
    """Return the keys at or below `prefix`, in the schema's order.

    Raises:
        InputError: no key begins with `prefix`.
    """
    keys = list(_keys_of(Recipe, ""))
    at = next(i for i, doc in enumerate(keys) if doc.key == "grpo_aks")
    shared = KeyDoc("grpo", "mapping", "{}", _SHARED_GRPO)
    keys[at:at] = [shared, *_keys_of(GrpoSection, "grpo.")]
    wanted = prefix.strip(".")
    chosen = [d for d in keys if not wanted or _within(d.key, wanted)]
    if not chosen:
        raise InputError("no such key; `rcot recipe keys` lists all of them", key=wanted)
    return chosen


def _within(key: str, prefix: str) -> bool:
    plain = key.replace("[]", "")
    return any(k == prefix or k.startswith(f"{prefix}.") for k in (key, plain))


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[KeyDoc]:
    for name, field in section.model_fields.items():
        below, suffix = _section_below(field.annotation)
        meaning = field.description or ""
        if not meaning and below is not None:
            meaning = (below.__doc__ or "").strip()
        key = f"{prefix}{name}"
        yield KeyDoc(key, _field_type(field), _default(field), " ".join(meaning.split()))
        if below is not None:
            yield from _keys_of(below, f"{key}{suffix}.")


def _section_below(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The section that values of `annotation` are or hold, and what stands before its keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return _section_below(arguments[0])[0], "[]"
    if origin is dict:
        return _section_below(arguments[1])[0], ".<name>"
    for argument in arguments if origin in (typing.Union, types.UnionType) else ():
        below = _section_below(argument)
        if below[0] is not None:
            return below
    return None, ""


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
    """Write a type as a reader of YAML would: `int`, `a | b`, `list of text`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in arguments)
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
    """One line of YAML."""
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()


def show(recipe: Recipe, source: Source) -> str:
    """Write a resolved recipe as YAML, every value with its origin behind it as a comment.

    The origin is a file and line, `command line`, or `default`. The text is itself a recipe.

    Args:
        recipe: the resolved recipe.
        source: the merged tree that it was made from.
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
    """What an entry of a list says, defaults left out."""
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
    """Return the documentation's key reference: a table for each top-level key, in Markdown."""
    rows: dict[str, list[KeyDoc]] = {"Top level": []}
    for doc in recipe_keys():
        first, _, below = doc.key.partition(".")
        if below:
            rows.setdefault(first.removesuffix("[]"), []).append(doc)
        else:
            rows["Top level"].append(doc)
    parts = [
        "# Recipe keys\n\nGenerated from the schema by `make docs`. `[]` stands for an entry of a "
        "list, `<name>` for a name of\nyour own. `rcot recipe keys PREFIX` prints the same.\n"
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
    """Escape a table cell; in code spans Markdown takes `<` as it is."""
    spans = text.replace("|", "\\|").split("`")
    return "`".join(s if i % 2 else s.replace("<", "&lt;") for i, s in enumerate(spans))
