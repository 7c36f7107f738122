"""Read a growing `metrics.jsonl` step by step, also across its replacement by a resumed attempt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rcot_rl.monitoring.run_files.metrics import is_training_step


class StepTail:
    """Reads complete lines of a metrics file, one at a time, from where the last call stopped.

    A resumed attempt replaces the file by a shorter one and repeats the steps after its checkpoint.
    The bytes before the offset then differ from the line that was read last: each line has its own
    time. The file is read again from its start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._last = b""
        """The line that ends at the offset."""

    def restart(self) -> None:
        """Read the file from its start at the next call."""
        self._offset, self._last = 0, b""

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the complete lines since the last call; those without a step are left out.

        A line counts as read once the next one is requested.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset - len(self._last))
            if file.read(len(self._last)) != self._last:
                self.restart()
                file.seek(0)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                line = _step_in(raw)
                if line is not None:
                    yield line
                self._offset, self._last = self._offset + len(raw), raw


def _step_in(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if isinstance(step, int) and step > 0 else None


def repeated_steps(stage: Path) -> int:
    """Return how often attempts of a stage repeated a step that an earlier attempt had logged."""
    logs = sorted(stage.glob("attempt-*/verl.jsonl"))
    if len(logs) < 2:
        return 0
    seen: set[int] = set()
    count = 0
    for log in logs:
        steps = set()
        with log.open("rb") as file:
            for raw in file:
                line = _step_in(raw)
                if line is not None and is_training_step(line.get("data")):
                    steps.add(line["step"])
        count += len(steps & seen)
        seen |= steps
    return count
