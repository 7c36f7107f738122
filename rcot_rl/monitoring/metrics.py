"""From verl's file log to the run's `metrics.jsonl`: one flat JSON object a step.

verl's `file` logger writes {"step", "data"} and starts its file anew with each process, so every
attempt has one of its own. `Follower` reads it as it grows and appends to the stage's
`metrics.jsonl`, which spans attempts: steps that a resumed attempt does again replace the old ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcot_rl.files import write_text


class Follower:
    """Follows `source` (verl's log of one attempt) into `target` (the stage's metrics)."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source = source
        self.target = target
        self.latest: dict[str, Any] | None = None
        self._offset = 0
        self._first = True

    def poll(self) -> list[dict[str, Any]]:
        """New complete lines since the last call, written and returned."""
        if not self.source.is_file():
            return []
        with self.source.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = _steps_in(whole, time.time())
        if lines:
            self._write(lines)
            self.latest = lines[-1]
        return lines

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self._first:
            keep_steps_before(self.target, lines[0]["step"])
            self._first = False
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with self.target.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _steps_in(log: bytes, now: float) -> list[dict[str, Any]]:
    """The training steps among complete lines of verl's log; validation has lines of its own."""
    entries = [json.loads(raw) for raw in log.splitlines()]
    lines = [{"step": e["step"], "time": now} | e["data"] for e in entries]
    return [line for line in lines if "training/global_step" in line or "train/loss" in line]


def recover_steps(path: Path, logs: Sequence[Path], newest: int) -> None:
    """Add steps up to `newest` that a killed command left in verl's logs, but not in `path`.

    logs: verl's logs of earlier attempts, in their order; a later attempt's line of a step counts.
    """
    lines = {line["step"]: line for line in read_metrics(path)}
    missing: dict[int, dict[str, Any]] = {}
    for log in logs:
        if log.is_file():
            data = log.read_bytes()
            for line in _steps_in(data[: data.rfind(b"\n") + 1], log.stat().st_mtime):
                if line["step"] <= newest and line["step"] not in lines:
                    missing[line["step"]] = line
    if missing:
        rows = [row for _, row in sorted((lines | missing).items())]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All steps of a `metrics.jsonl`; an unfinished last line is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def restore_step(path: Path, saved: Path) -> None:
    """Append the metrics `saved` with a checkpoint, unless the step has its line already."""
    if not saved.is_file():
        return
    line = json.loads(saved.read_text(encoding="utf-8"))
    lines = read_metrics(path)
    if not lines or lines[-1]["step"] < line["step"]:
        write_text(path, "".join(json.dumps(row) + "\n" for row in [*lines, line]))


def keep_steps_before(path: Path, step: int) -> None:
    """Drop the lines of `step` and later: they are about to be done again."""
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] < step]
    if len(kept) == len(lines):
        return
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
