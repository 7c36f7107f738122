"""Validate what a user's reward function returned: reward, components and reasons.

A result is a number, or a dict with `reward` (or verl's `score`, or EasyR1's `overall`), numeric
components and optional `reasons`, a list of short texts. The components are siblings of the reward
or, as in the output of `rcot score`, in a dict `components`. Runs in the guard's child. The reason
codes of failures are defined here too.
"""

from __future__ import annotations

import math
import traceback
from numbers import Real
from pathlib import Path
from typing import Any

RAISED = "reward_function_raised"
BAD_RESULT = "reward_function_bad_result"
TIMEOUT = "reward_function_timeout"
DIED = "reward_function_died"

MAX_COMPONENTS = 64
"""Every component becomes a metric; more than this is a mistake."""

MAX_REASONS = 64
MAX_NAME = 200
"""Maximum length of a component's name or a reason, in characters."""


class BadResult(Exception):
    """The function returned an invalid result; the message says why."""


def read_result(result: Any) -> tuple[float, dict[str, float], list[str]]:
    """Return reward, components and reasons of one result. Raises BadResult."""
    parts = dict(result) if isinstance(result, dict) else {"reward": result}
    reasons = parts.pop("reasons", [])
    total = next((key for key in ("reward", "score", "overall") if key in parts), None)
    if total is None:
        raise BadResult(f"dict without the key 'reward'; it has {_names(parts)}")
    if isinstance(parts.get("components"), dict):
        parts = _beside(parts.pop("components"), parts)
    parts = {key: _plain(value) for key, value in parts.items()}
    for key, value in parts.items():
        if not isinstance(key, str) or not 0 < len(key) <= MAX_NAME:
            raise BadResult(f"a component's name is not a string of 1 to {MAX_NAME} characters")
        if not _finite(value):
            raise BadResult(f"{key!r} is {_shown(value)}, not a finite number")
    if len(parts) > MAX_COMPONENTS + 1:
        raise BadResult(f"more than {MAX_COMPONENTS} components")
    are_texts = isinstance(reasons, list | tuple) and all(isinstance(r, str) for r in reasons)
    if not are_texts or len(reasons) > MAX_REASONS or any(len(r) > MAX_NAME for r in reasons):
        limits = f"at most {MAX_REASONS} strings of at most {MAX_NAME} characters"
        raise BadResult(f"'reasons' is not a list of {limits}")
    reward = float(parts.pop(total))
    return reward, {key: float(value) for key, value in parts.items()}, list(reasons)


def read_results(results: Any, count: int) -> list[Any]:
    """Return the results of a batch call, one per sample. Raises BadResult."""
    if hasattr(results, "tolist"):
        results = results.tolist()
    if not isinstance(results, list | tuple):
        raise BadResult(f"{_shown(results)}, not a list of {count} results")
    if len(results) != count:
        raise BadResult(f"{len(results)} results for {count} responses")
    return list(results)


def where(error: BaseException) -> str:
    """Describe an exception in a user's function in one line: type, message, file and line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_guard(f.filename)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}".split("\n")[0][:300] + place


def _is_guard(filename: str) -> bool:
    return Path(filename).parent == Path(__file__).parent


def _beside(components: dict[Any, Any], parts: dict[Any, Any]) -> dict[Any, Any]:
    duplicates = [key for key in components if key in parts]
    if duplicates:
        raise BadResult(f"{duplicates[0]!r} occurs twice, in 'components' and beside it")
    return {**parts, **components}


def _plain(value: Any) -> Any:
    """Convert a NumPy scalar to a Python one (a NumPy bool is not a `Real`)."""
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if is_scalar else value


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, Real) else f"a {type(value).__name__}"


def _names(parts: dict[Any, Any]) -> str:
    return ", ".join(map(str, list(parts)[:8]))[:100] or "none"
