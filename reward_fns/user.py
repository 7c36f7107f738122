"""Users' own rewards: `FILE.py:FUNCTION`, called as f(response, ground_truth, **kwargs).

It returns a number, or a dict with `reward`, numeric components and, if it likes, `reasons` (a list
of texts). It may name further parameters: the other keys of the row are passed by name, as far as
it has parameters for them. Whatever it raises or returns costs that one sample (reward 0 and a
reason code), never the run.

Left out: deadlines, batch and async functions (an async one is refused when it is loaded).
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

from rcot_rl.errors import InputError

RAISED = "reward_function_raised"
BAD_RESULT = "reward_function_bad_result"


def is_user_reward(spec: str) -> bool:
    """Whether a reward is given as FILE.py:FUNCTION."""
    file, colon, function = spec.rpartition(":")
    return bool(colon) and file.endswith(".py") and function.isidentifier()


def load_function(spec: str) -> tuple[Callable[..., Any], str]:
    """The function of FILE.py:FUNCTION and the sha256 of its file and name.

    Runs the file. Raises InputError when it cannot be read, does not run, or holds no such plain
    function of two positional parameters.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    try:
        digest = hashlib.sha256(path.read_bytes() + b"\0" + name.encode()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from error
    module_name = f"rcot_user_reward_{digest[:16]}"
    module_spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    if module_spec is None or module_spec.loader is None:  # of no suffix that Python knows
        raise InputError("is no Python file", file=path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        line = error.lineno if isinstance(error, SyntaxError) else None
        message = f"does not run: {type(error).__name__}: {error}".split("\n")[0]
        raise InputError(message, file=path, line=line) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError("no such function", file=path, key=name)
    if inspect.iscoroutinefunction(function):
        raise InputError("must be a plain function, not async", file=path, key=name)
    _check_parameters(function, path, name)
    return function, digest


def _check_parameters(function: Callable[..., Any], path: Path, name: str) -> None:
    try:
        inspect.signature(function).bind("", None)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"must be callable as f(response, ground_truth): {error}", file=path, key=name
        ) from error


def accepted(function: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `kwargs` that can be passed by name, besides two positional arguments."""
    parameters = list(inspect.signature(function).parameters.values())
    taken = {p.name for p in parameters[:2] if p.kind is not p.VAR_KEYWORD}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return {key: value for key, value in kwargs.items() if key not in taken}
    by_name = {
        p.name for p in parameters[2:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
    return {key: value for key, value in kwargs.items() if key in by_name}


def call(
    function: Callable[..., Any], response: str, truth: Any, kwargs: dict[str, Any]
) -> tuple[float, dict[str, float], list[str]]:
    """Reward, components and reasons of one sample. Raises nothing but what ends the process."""
    try:
        result = function(response, truth, **kwargs)
    except (Exception, SystemExit) as error:
        return 0.0, {}, [RAISED, f"{RAISED}:{type(error).__name__}"]
    parts = dict(result) if isinstance(result, dict) else {"reward": result}
    reasons = parts.pop("reasons", [])
    numbers = all(isinstance(v, Real) and math.isfinite(v) for v in parts.values())
    texts = isinstance(reasons, list) and all(isinstance(r, str) for r in reasons)
    if "reward" not in parts or not numbers or not texts:
        return 0.0, {}, [BAD_RESULT]
    reward = float(parts.pop("reward"))
    return reward, {str(key): float(value) for key, value in parts.items()}, list(reasons)
