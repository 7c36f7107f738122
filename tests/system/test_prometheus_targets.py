"""Addresses for Prometheus: one group of Ray's nodes, one of engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray

from rcot_rl.system.prometheus_targets import targets_file, write_targets

NODES = [
    {"Alive": True, "NodeManagerAddress": "10.0.0.1", "MetricsExportPort": 8090},
    {"Alive": False, "NodeManagerAddress": "10.0.0.2", "MetricsExportPort": 8090},
    {"Alive": True, "NodeManagerAddress": "10.0.0.3", "MetricsExportPort": 8090},
]


def test_nodes_that_are_alive_and_engines_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: NODES)
    file = targets_file(tmp_path, "grpo-ktg")
    write_targets(file, ["10.0.0.3:41001"])
    assert file == tmp_path / "tracking/prometheus/grpo-ktg.json"
    ray_group, engines = json.loads(file.read_text())
    assert ray_group["targets"] == ["10.0.0.1:8090", "10.0.0.3:8090"]
    assert engines == {
        "targets": ["10.0.0.3:41001"],
        "labels": {"job": "vllm", "stage": "grpo-ktg"},
    }
    write_targets(file)
    assert [group["labels"]["job"] for group in json.loads(file.read_text())] == ["ray"]
