"""Keys of values that trackers accept."""

from __future__ import annotations

import re

_OTHER = re.compile(r"[^A-Za-z0-9_]+")


def value_key(*parts: str) -> str:
    """Return parts joined by `/`, with `_` for what trackers cannot filter and sort by.

    `J&F` becomes `JF`; `mevis-valid_u` becomes `mevis_valid_u`.
    """
    return "/".join(_OTHER.sub("_", part.replace("J&F", "JF")) for part in parts)
