"""What the GPU benchmarks share: the host, a record that survives a kill, and a time limit."""

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

from rcot_rl.files import write_text
from rcot_rl.runfolder import git_commit

PACKAGES = ("verl", "ray", "torch", "transformers", "vllm", "tensordict", "numpy")


def host() -> dict[str, Any]:
    """Hardware, versions and commit."""
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


class Record:
    """Rows of a benchmark: each is printed as a JSON line and written to `file` at once."""

    def __init__(self, file: Path | None, seconds: float | None, **about: Any) -> None:
        """file: where the whole record is kept; seconds: the time limit, None for no limit."""
        self.file = file
        self.about = {"host": host(), **about}
        self.rows: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._limit = seconds

    def add(self, row: dict[str, Any]) -> None:
        """Print and keep one row."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self, **more: Any) -> None:
        """Write what is known so far, and `more`, to the file."""
        self.about |= more
        if self.file is not None:
            whole = self.about | {"rows": self.rows}
            write_text(self.file, json.dumps(whole, indent=1) + "\n")

    def left(self) -> float:
        """Seconds until the time limit."""
        spent = time.monotonic() - self._started
        return float("inf") if self._limit is None else self._limit - spent


class GpuMemory:
    """The most memory in use on the GPU, of all processes together, asked for every half second."""

    def __init__(self) -> None:
        self.most_mib = 0.0
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
            answer = _nvidia_smi("memory.used")
            if not answer:
                return
            self.most_mib = max(self.most_mib, float(answer.split()[0]))
            if self._stop.wait(0.5):
                return


def _nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().splitlines()[0]
