"""What the records of a `.wandb` file add up to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

from rcot_rl.monitoring.trackers.wandb_file import read_wandb_records


@dataclass
class OfflineRun:
    """What the records of a file add up to."""

    run: pb.RunRecord
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, pb.MetricRecord] = field(default_factory=dict)
    artifacts: list[pb.ArtifactRecord] = field(default_factory=list)
    alerts: list[pb.AlertRecord] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def steps(self) -> list[int]:
        """Steps of the history, in the order in which they were written."""
        return [line["_step"] for line in self.history]


def read_run(path: Path) -> OfflineRun:
    """Return what a file tells about its run."""
    run = OfflineRun(pb.RunRecord())
    for record in read_wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run = record.run
            run.config = _items(record.run.config.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            for key, value in _items(record.summary.update).items():
                old = run.summary.get(key)
                merged = isinstance(value, dict) and isinstance(old, dict)
                run.summary[key] = old | value if merged else value
        elif kind == "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "alert":
            run.alerts.append(record.alert)
        elif kind == "files":
            run.files += [file.path for file in record.files.files]
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _items(items: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        inner = values
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = json.loads(item.value_json)
    return values
