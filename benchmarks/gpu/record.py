"""Shared by the GPU benchmarks: the host, a record that survives a kill, and a time limit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rcot_rl.runfolder import git_commit
from rcot_rl.system.files import write_text

PACKAGES = ("verl", "ray", "torch", "transformers", "vllm", "tensordict", "numpy")


def host() -> dict[str, Any]:
    """Return hardware, versions and commit."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "gpu": _nvidia_smi("name,driver_version,memory.total") or "none",
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": os.environ.get("RCOT_COMMIT") or git_commit(),
    }


class BenchRecord:
    """Rows of a benchmark; each is printed as a JSON line and written to `file` at once."""

    def __init__(self, file: Path | None, seconds: float | None, **metadata: Any) -> None:
        """Start the time limit.

        Args:
            file: File for the whole record, if any.
            seconds: Time limit; None for no limit.
            metadata: JSON values of the record beside its rows.
        """
        self.file = file
        self.metadata = {"host": host(), **metadata}
        self.rows: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._limit = seconds

    def add(self, row: dict[str, Any]) -> None:
        """Print and keep one row."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self, **more: Any) -> None:
        """Write the record, with `more` metadata, to the file."""
        self.metadata |= more
        if self.file is not None:
            record = self.metadata | {"rows": self.rows}
            write_text(self.file, json.dumps(record, indent=1) + "\n")

    def left(self) -> float:
        """Return the seconds until the time limit."""
        spent = time.monotonic() - self._started
        return float("inf") if self._limit is None else self._limit - spent


class GpuMemory:
    """Peak memory of all processes on the GPU, polled every half second."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> GpuMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            used = _nvidia_smi("memory.used")
            if not used:
                return
            self.peak_mib = max(self.peak_mib, float(used.split()[0]))
            if self._stop.wait(0.5):
                return


def _nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip().splitlines()[0]
