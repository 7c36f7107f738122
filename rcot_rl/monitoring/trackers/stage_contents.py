"""What a follower sends of a stage: its steps, results, alerts and artifacts."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rcot_rl.monitoring.judgement.alert import Alert
from rcot_rl.monitoring.judgement.alert_rules import AlertWatch, alerts_of
from rcot_rl.monitoring.run_files.run_reader import RunReader, StageView
from rcot_rl.monitoring.run_files.step_tail import StepTail, repeated_steps
from rcot_rl.monitoring.trackers.stage_source import StageSource
from rcot_rl.monitoring.trackers.tracker import TrackedArtifact, Value
from rcot_rl.stats.json_values import is_number

logger = logging.getLogger(__name__)


AlertKey = list[Any]
"""Code and step of an alert, and its number among those with the same."""


class StageContents:
    """A stage of a run folder, read while it grows."""

    def __init__(self, reader: RunReader, view: StageView) -> None:
        self.view = view
        self.faults = 0
        """Steps whose pictures or tables could not be made; their scalars are sent."""

        self._reader = reader
        self._source = StageSource(reader, view.name)
        self._watch = AlertWatch(reader, view.name)
        self._alerts: Counter[tuple[str, int]] = Counter()
        self._tail = StepTail(view.folder / "metrics.jsonl")

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines since the last call; a resumed attempt repeats steps."""
        return self._tail.new_lines()

    def values(self, line: dict[str, Any]) -> dict[str, Value]:
        """Return the values of a step, with its time in seconds since the epoch."""
        scalars: dict[str, Value] = {k: v for k, v in line.items() if is_number(v)}
        try:
            values = self._source.step(line)
        except Exception:  # of a picture, say: the curves of the run must not end with it
            logger.exception("%s: step %s: only its scalars are sent", self.view.name, line["step"])
            self.faults += 1
            values = scalars
        return values | {"time": scalars["time"]} if "time" in scalars else values

    def results(self) -> dict[str, Value]:
        """Return the results of a stage without steps."""
        return self._source.results()

    def summary(self) -> dict[str, Value]:
        """Return values of the whole stage."""
        values: dict[str, Value] = {"repeated_steps": repeated_steps(self.view.folder)}
        return self._source.summary() | values

    def artifacts(self) -> list[TrackedArtifact]:
        """Return the files that the stage made and used."""
        return self._source.artifacts()

    def alerts_at(self, line: dict[str, Any] | None) -> list[tuple[AlertKey, Alert]]:
        """Return the new alerts: those of failed attempts and, with a line, those of its step."""
        new = self._watch.new_failures() if line is None else self._watch.update(line)
        return [(self._key(alert), alert) for alert in new]

    def all_alerts(self) -> list[tuple[AlertKey, Alert]]:
        """Return all alerts of the stage."""
        self._alerts.clear()
        return [(self._key(a), a) for a in alerts_of(self._reader, self.view.name)]

    def _key(self, alert: Alert) -> AlertKey:
        self._alerts[alert.code, alert.step] += 1
        return [alert.code, alert.step, self._alerts[alert.code, alert.step]]


def digest(value: Any) -> str:
    """Return a digest of values, tables, pictures and artifacts, to notice a change."""
    sha = hashlib.sha256()
    for part in _parts(value):
        sha.update(part)
    return sha.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    """Yield the bytes of a value; brackets and separators keep different values apart."""
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, Mapping):
        yield b"{"
        for key in sorted(value, key=str):
            yield f"{key!r}:".encode()
            yield from _parts(value[key])
        yield b"}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        yield from _parts({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield b"["
        for item in value:
            yield from _parts(item)
            yield b","
        yield b"]"
    else:
        yield repr(value).encode(errors="backslashreplace")
