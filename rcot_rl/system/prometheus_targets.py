"""Addresses of a run's Prometheus endpoints, in the format of Prometheus' `file_sd_configs`.

Ray's endpoints have the port that the recipe sets, on every node; the rollout engines serve theirs
on ports that are only known once they run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rcot_rl.recipe.tracking_section import TRACKING
from rcot_rl.system.files import write_text


def targets_file(run: Path, stage: str) -> Path:
    """Return the file of a stage's addresses: Prometheus reads RUN/tracking/prometheus/*.json."""
    return run / TRACKING / "prometheus" / f"{stage}.json"


def write_targets(file: Path, engines: Sequence[str] = ()) -> None:
    """Write the addresses of the connected Ray's nodes, and of `engines`, to `file`.

    Args:
        file: As `targets_file` returns it; its stem is the label `stage`.
        engines: `address:port` of each rollout engine.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    addresses = {
        "ray": [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes],
        "vllm": list(engines),
    }
    groups = [
        {"targets": targets, "labels": {"job": job, "stage": file.stem}}
        for job, targets in addresses.items()
        if targets
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(groups, indent=1) + "\n")
