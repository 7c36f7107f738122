"""Load a user's reward function and find out how to call it.

Runs in the guard's child process (`guard_child.py`), the only place that executes users' code.
Imports only the standard library, so that a child starts in a tenth of a second. The names of the
parameters decide how a function is called:

| parameters | called with |
| --- | --- |
| two positional ones of any name, then any row keys | one response and its ground truth |
| `responses, ground_truths`, or REWARD_TYPE = "batch" | lists; row keys are lists too |
| `solution_str, ground_truth` and `data_source`, `extra_info` | verl's names, one sample |
| `solution_strs, ground_truths` and `data_sources`, `extra_infos` | verl's names, lists |
| `reward_input` / `reward_inputs` | EasyR1's dict, or list of dicts |

Each may be `async def`. REWARD_TYPE is an attribute of the function or a constant of its module.
`user_result.py` defines what it may return. Images of a row are not passed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

VERL = {"solution_str": "solution_strs", "ground_truth": "ground_truths"}
VERL_ROW = {"data_source": "data_sources", "extra_info": "extra_infos"}
INPUTS = ("reward_input", "reward_inputs")
BATCH = "batch"

Sample = list[Any]
"""[response, ground truth, row]: one sample in the protocol."""


class LoadError(Exception):
    """The function cannot be loaded; has line and key if they are known."""

    def __init__(self, message: str, line: int | None = None, key: str | None = None) -> None:
        super().__init__(message)
        self.line, self.key = line, key


Style = Literal["plain", "verl", "inputs"]


@dataclass(frozen=True)
class UserFunction:
    """A function and how to call it."""

    call: Callable[..., Any]
    style: Style
    """`inputs` is EasyR1's."""
    batch: bool
    is_async: bool
    accepts: frozenset[str] | None
    """Row keys that it accepts; None: all."""
    taken: frozenset[str]
    """Parameter names of response and ground truth, which row keys must not use."""
    components: tuple[str, ...] | None
    """Declared by COMPONENTS, in the module or as an attribute of the function."""
    digest: str
    """sha256 of the module's source file; empty for a FILE.py, which the parent has read."""

    @property
    def row_keys(self) -> frozenset[str] | None:
        """Row keys that the parent must send; None: all."""
        if self.accepts is None or self.style == "inputs":
            return None
        singular = {key for key, plural in VERL_ROW.items() if plural in self.accepts}
        return self.accepts | singular if self.style == "verl" else self.accepts

    def arguments(
        self, samples: list[Sample], constants: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return positional and keyword arguments of one call. Non-batch: one sample."""
        rows = [self._row(row) for _, _, row in samples]
        if self.batch:
            keys = dict.fromkeys(key for row in rows for key in row)
            columns = {key: [row.get(key) for row in rows] for key in keys}
            fixed = {k: v for k, v in self._row(constants).items() if k not in columns}
            responses, truths = [s[0] for s in samples], [s[1] for s in samples]
        else:
            columns, fixed = rows[0], self._row(constants)
            responses, truths = samples[0][0], samples[0][1]
        if self.style == "inputs":
            inputs = [
                {"response": text, "ground_truth": truth, **constants, **row}
                for text, truth, row in samples
            ]
            return [inputs if self.batch else inputs[0]], {}
        named = {**fixed, **columns}
        if self.style == "verl":
            return [], self._verl(responses, truths, samples, named)
        return [responses, truths], named

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.accepts is None:
            return {key: value for key, value in row.items() if key not in self.taken}
        return {key: value for key, value in row.items() if key in self.accepts}

    def _verl(
        self, responses: Any, truths: Any, samples: list[Sample], named: dict[str, Any]
    ) -> dict[str, Any]:
        """Use verl's names, plural in a batch; `extra_info` is a dict even if the row has none."""
        rows = [row for _, _, row in samples]
        sources = [row.get("data_source") for row in rows]
        extras = [row.get("extra_info") or {} for row in rows]
        fixed: dict[str, Any]
        optional: dict[str, Any]
        if self.batch:
            fixed = dict(zip(VERL.values(), (responses, truths), strict=True))
            optional = dict(zip(VERL_ROW.values(), (sources, extras), strict=True))
        else:
            fixed = dict(zip(VERL, (responses, truths), strict=True))
            optional = dict(zip(VERL_ROW, (sources[0], extras[0]), strict=True))
        named = {k: v for k, v in named.items() if k not in VERL_ROW}
        if self.accepts is not None:
            optional = {k: v for k, v in optional.items() if k in self.accepts}
        return {**named, **optional, **fixed}


def load_file(path: str, source: bytes, name: str) -> UserFunction:
    """Load the function `name` from the `source` of a file.

    The file's folder is appended to `sys.path`, so that it can import its neighbours.
    Raises LoadError.
    """
    module = types.ModuleType(f"rcot_user_reward_{hashlib.sha256(source).hexdigest()[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses and pickle look up their module there
    sys.path.append(str(Path(path).parent))
    try:
        # the user's own reward, in the guard's child process: running it is the point
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException as error:
        raise _does_not_run(error, path) from error
    return describe(_attribute(module, name), module, name, "")


def load_module(name: str, attribute: str) -> UserFunction:
    """Load a function from an importable module. Raises LoadError."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        hint = "install it, or put its folder on PYTHONPATH"
        raise LoadError(f"cannot be imported: {error}; {hint}") from error
    except BaseException as error:
        raise _does_not_run(error, None) from error
    file = getattr(module, "__file__", None)
    content = Path(file).read_bytes() if file else name.encode()
    digest = hashlib.sha256(content).hexdigest()
    return describe(_attribute(module, attribute), module, attribute, digest)


def _does_not_run(error: BaseException, path: str | None) -> LoadError:
    """Return the error with the line of the user's file that failed, if it is known."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if path is not None and frame.filename == path:
            line = frame.lineno
    message = f"does not run: {type(error).__name__}: {error}".split("\n")[0]
    return LoadError(message, line=line)


def _attribute(module: types.ModuleType, name: str) -> Callable[..., Any]:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if not callable(value):
        raise LoadError("no such function", key=name)
    return value


def describe(
    function: Callable[..., Any], module: Any, name: str, digest: str = ""
) -> UserFunction:
    """Find out how to call `function`. Raises LoadError if no style fits."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise LoadError(f"has no signature: {error}", key=name) from error
    names = [p.name for p in parameters]
    kind = getattr(function, "REWARD_TYPE", getattr(module, "REWARD_TYPE", None))
    style: Style = "plain"
    batch = kind == BATCH or names[:2] == ["responses", "ground_truths"]
    taken = names[:2]
    if names and names[0] in INPUTS:
        style, batch, taken = "inputs", names[0] == INPUTS[1], names[:1]
    elif set(VERL) <= set(names) or set(VERL.values()) <= set(names):
        style, batch = "verl", set(VERL.values()) <= set(names)
        taken = list(VERL.values() if batch else VERL)
    _check_call(function, style, taken, name)
    plain = inspect.unwrap(getattr(function, "func", function))  # unwrap partial and wraps
    declared = getattr(function, "COMPONENTS", getattr(module, "COMPONENTS", None))
    return UserFunction(
        call=function,
        style=style,
        batch=batch,
        is_async=any(
            inspect.iscoroutinefunction(f) for f in (function, plain, type(function).__call__)
        ),
        accepts=_accepted(parameters, taken),
        taken=frozenset(taken),
        components=_declared(declared, name),
        digest=digest,
    )


def _check_call(function: Callable[..., Any], style: Style, taken: list[str], name: str) -> None:
    """Raise LoadError unless it accepts a response and a ground truth.

    Further parameters without a default are filled from the row, whose keys only the data know.
    """
    signature = inspect.signature(function)
    positional: list[Any] = {"verl": [], "inputs": [None]}.get(style, ["", None])
    named = taken if style == "verl" else []
    needed = [
        p.name
        for p in list(signature.parameters.values())[len(positional) :]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    try:
        signature.bind(*positional, **dict.fromkeys([*named, *needed]))
    except TypeError as error:
        message = f"must be callable as f(response, ground_truth): {error}"
        raise LoadError(message, key=name) from error


def _accepted(parameters: list[inspect.Parameter], taken: list[str]) -> frozenset[str] | None:
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return frozenset(p.name for p in parameters if p.kind in by_name and p.name not in taken)


def _declared(value: Any, name: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not all(isinstance(key, str) for key in value):
        raise LoadError("COMPONENTS must be a tuple of names", key=name)
    return tuple(value)
