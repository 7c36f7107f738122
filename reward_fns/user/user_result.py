"""What a user's reward function returned, read: reward, components and reasons.

A result is a number, or a dict with `reward` (verl's `score` and EasyR1's `overall` are taken too),
numeric components and, if it likes, `reasons`, a list of short texts. The components stand beside
the reward or, as in a line of `rcot score`, in a dict of their own. Runs in the guard's child.
"""

from __future__ import annotations

import math
import traceback
from numbers import Real
from pathlib import Path
from typing import Any

MAX_COMPONENTS = 64
"""More is no reward but a mistake, and every component becomes a column of the metrics."""

MAX_REASONS = 64
MAX_NAME = 200
"""Characters of a component's name or a reason."""


class BadResult(Exception):
    """What the function returned is no reward; the message says why."""


def read_result(result: Any) -> tuple[float, dict[str, float], list[str]]:
    """Reward, components and reasons of what a function returned. Raises BadResult."""
    parts = dict(result) if isinstance(result, dict) else {"reward": result}
    reasons = parts.pop("reasons", [])
    total = next((key for key in ("reward", "score", "overall") if key in parts), None)
    if total is None:
        raise BadResult(f"a dict without the key 'reward'; it has {_names(parts)}")
    if isinstance(parts.get("components"), dict):
        parts = _beside(parts.pop("components"), parts)
    parts = {key: _plain(value) for key, value in parts.items()}
    for key, value in parts.items():
        if not isinstance(key, str) or not 0 < len(key) <= MAX_NAME:
            raise BadResult("a component's name is no short text")
        if not _finite(value):
            raise BadResult(f"{key!r} is {_shown(value)}, not a finite number")
    if len(parts) > MAX_COMPONENTS + 1:
        raise BadResult(f"more than {MAX_COMPONENTS} components")
    texts = isinstance(reasons, list | tuple) and all(isinstance(r, str) for r in reasons)
    if not texts or len(reasons) > MAX_REASONS or any(len(r) > MAX_NAME for r in reasons):
        raise BadResult("'reasons' is no list of a few short texts")
    reward = float(parts.pop(total))
    return reward, {key: float(value) for key, value in parts.items()}, list(reasons)


def read_results(results: Any, count: int) -> list[Any]:
    """The results of a batch call, one a sample. Raises BadResult."""
    if hasattr(results, "tolist"):
        results = results.tolist()
    if not isinstance(results, list | tuple):
        raise BadResult(f"{_shown(results)}, not a list of {count} results")
    if len(results) != count:
        raise BadResult(f"{len(results)} results for {count} responses")
    return list(results)


def where(error: BaseException) -> str:
    """One line on an exception in a user's function: type, message, file and line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _ours(f.filename)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}".split("\n")[0][:300] + place


def _ours(filename: str) -> bool:
    return Path(filename).parent == Path(__file__).parent


def _beside(components: dict[Any, Any], parts: dict[Any, Any]) -> dict[Any, Any]:
    twice = [key for key in components if key in parts]
    if twice:
        raise BadResult(f"{twice[0]!r} is there twice, in 'components' and beside it")
    return {**parts, **components}


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's own: NumPy's bool counts as no number else."""
    of_numpy = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if of_numpy else value


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, Real) else f"a {type(value).__name__}"


def _names(parts: dict[Any, Any]) -> str:
    return ", ".join(map(str, list(parts)[:8]))[:100] or "none"
