"""Read values of parsed JSON that may be incomplete."""

from __future__ import annotations

from typing import Any, TypeGuard


def at(value: Any, *keys: str) -> Any:
    """Return value[key][key]…, or None if any level is missing or no mapping."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def is_number(value: Any) -> TypeGuard[float]:
    """Return True for an int or float (no bool) that can be printed and drawn."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and -1e300 < value < 1e300
