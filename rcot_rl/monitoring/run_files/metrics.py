"""Converts verl's file log to a stage's `metrics.jsonl`: one flat JSON object per step.

verl's `file` logger writes {"step", "data"} and truncates its file when a process starts, so each
attempt has its own file. `StepCopier` reads it while it grows and appends to `metrics.jsonl`, which
spans attempts: steps that a resumed attempt repeats replace the old ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcot_rl.system.files import write_text


def complete_lines(path: Path, offset: int = 0) -> bytes:
    """Return the bytes after `offset` up to the last line end; empty if there is no file."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    return data[: data.rfind(b"\n") + 1]


class StepCopier:
    """Copies new steps from `source` (verl's log of one attempt) to `target` (the metrics file)."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source = source
        self.target = target
        self.latest: dict[str, Any] | None = None
        self._offset = 0
        self._first = True

    def poll(self) -> list[dict[str, Any]]:
        """Append the complete lines since the last call to `target` and return them."""
        log = complete_lines(self.source, self._offset)
        self._offset += len(log)
        lines = _steps_in(log, time.time())
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
    """Return the training steps among complete lines of verl's log, without validation lines."""
    entries = [json.loads(raw) for raw in log.splitlines()]
    lines = [{"step": e["step"], "time": now} | e["data"] for e in entries]
    return [line for line in lines if is_training_step(line)]


def is_training_step(data: Any) -> bool:
    """Return True for the metrics of a training step in verl's log; others are validations."""
    return isinstance(data, dict) and ("training/global_step" in data or "train/loss" in data)


def recover_steps(path: Path, logs: Sequence[Path], newest: int) -> None:
    """Add the steps that a killed command left in verl's logs but not in `path`.

    Args:
        path: The stage's `metrics.jsonl`.
        logs: verl's logs of earlier attempts, in order; the last line of a step wins.
        newest: The last step to add.
    """
    known = {line["step"]: line for line in read_metrics(path)}
    missing: dict[int, dict[str, Any]] = {}
    for log in logs:
        if log.is_file():
            for line in _steps_in(complete_lines(log), log.stat().st_mtime):
                if line["step"] <= newest and line["step"] not in known:
                    missing[line["step"]] = line
    if missing:
        _write_lines(path, [row for _, row in sorted((known | missing).items())])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all steps of a `metrics.jsonl`, without an unfinished last line."""
    return [json.loads(line) for line in complete_lines(path).splitlines()]


def restore_step(path: Path, saved: Path) -> None:
    """Append the metrics saved with a checkpoint, unless `path` already has that step."""
    if not saved.is_file():
        return
    line = json.loads(saved.read_text(encoding="utf-8"))
    lines = read_metrics(path)
    if not lines or lines[-1]["step"] < line["step"]:
        _write_lines(path, [*lines, line])


def keep_steps_before(path: Path, step: int) -> None:
    """Drop the lines of `step` and later, which are about to be repeated."""
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] < step]
    if len(kept) < len(lines):
        _write_lines(path, kept)


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
