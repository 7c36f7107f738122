"""The Grafana dashboard: its metrics exist, and its JSON has what Grafana needs to import it.

`tests/chain/prometheus_names.json` holds the names that a run's endpoints served; the slow test
there compares it with a run, and writes it again with RCOT_WRITE_GOLDEN=1.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

SERVED = Path(__file__).parent / "chain" / "prometheus_names.json"


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_every_metric_is_one_that_ray_or_vllm_serves(dashboard_names: set[str]) -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    served = json.loads(SERVED.read_text(encoding="utf-8"))
    on_gpus = {f"ray_{name}" for name in METRICS_GAUGES}
    unknown = dashboard_names - set(served["ray"]) - set(served["vllm"]) - on_gpus
    assert not unknown
    assert len(dashboard_names) > 20, "the pattern finds the names"


@pytest.mark.parametrize(
    "subject",
    [
        "ray_node_cpu_utilization",
        "ray_node_gpus_utilization",
        "ray_node_gram_used",
        "ray_object_store_used_memory",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_hits_total",
    ],
)
def test_hosts_gpus_object_store_and_engines_are_shown(
    dashboard_names: set[str], subject: str
) -> None:
    assert subject in dashboard_names


def test_grafana_can_import_it(dashboard: dict[str, Any]) -> None:
    assert dashboard["title"] and dashboard["uid"] and len(dashboard["uid"]) <= 40
    assert isinstance(dashboard["schemaVersion"], int)
    assert "id" not in dashboard, "Grafana gives the number of the database's row"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in panels(dashboard):
        assert panel["title"] and panel["description"], panel["id"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert references and len(set(references)) == len(references), panel["title"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_expressions_are_balanced_and_use_known_variables(dashboard: dict[str, Any]) -> None:
    known = {f"${variable['name']}" for variable in dashboard["templating"]["list"]}
    for panel in panels(dashboard):
        for target in panel["targets"]:
            text = target["expr"]
            for left, right in ("()", "{}", "[]"):
                assert text.count(left) == text.count(right), text
            used = {part.split('"')[0].split("]")[0] for part in text.split("$")[1:]}
            assert {f"${name}" for name in used} <= known | {"$__rate_interval"}, text


def test_panels_fit_the_grid_without_overlap(dashboard: dict[str, Any]) -> None:
    cells = {}
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24, panel["title"]
        columns = range(place["x"], place["x"] + place["w"])
        rows = range(place["y"], place["y"] + place["h"])
        cells[panel["id"]] = {(x, y) for x in columns for y in rows}
    for one, other in combinations(cells, 2):
        assert not cells[one] & cells[other], (one, other)
