"""The RayJob's manifest against KubeRay's own schema: no key that the API server would drop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.launch import kuberay
from rcot_rl.recipe.loader import RECIPES, load_recipe

SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay_rayjob.yaml").read_text())
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
ALL = [
    "launch.secrets=[WANDB_API_KEY]",
    "launch.kuberay.secret=keys",
    "launch.kuberay.env_from=[more]",
    "launch.kuberay.gpu.node_selector={pool: h100}",
    "launch.kuberay.gpu.tolerations=[{key: nvidia.com/gpu, effect: NoSchedule}]",
    "launch.kuberay.image_pull_secrets=[registry]",
    "launch.kuberay.service_account=trainer",
    "cluster.object_store_bytes=8000000000",
    "cluster.metrics_port=8090",
]


def faults(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    """Yield what a strict API server would refuse in `value`."""
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, int | str):
            yield f"{path} is {value!r}"
        return
    if "properties" not in schema and "additionalProperties" not in schema:
        kind = TYPES.get(schema.get("type", ""), object)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            yield f"{path} is {value!r}, no {schema['type']}"
        elif isinstance(value, list):
            for number, item in enumerate(value):
                yield from faults(item, schema.get("items", {}), f"{path}.{number}")
        return
    if not isinstance(value, dict):
        yield f"{path} is no mapping"
        return
    yield from (
        f"{path}.{name} is missing" for name in schema.get("required", []) if name not in value
    )
    for name, item in value.items():
        known = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        if known is None:
            yield f"{path}.{name} is unknown"
        else:
            yield from faults(item, known, f"{path}.{name}")


def rayjob(name: str, *overrides: str) -> dict[str, Any]:
    objects = kuberay.manifest(load_recipe(name, list(overrides)))
    (job,) = [o for o in yaml.safe_load_all(kuberay.text(objects)) if o["kind"] == "RayJob"]
    return job


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.folder.glob("rcot_seg_*.yaml")))
def test_every_recipes_manifest_fits(name: str) -> None:
    assert list(faults(rayjob(name), SCHEMA, "RayJob")) == []


def test_a_manifest_with_every_setting_fits() -> None:
    assert list(faults(rayjob("rcot_seg_3b_2x8gpu", *ALL), SCHEMA, "RayJob")) == []


def test_every_pod_serves_metrics_on_the_port_of_the_recipe() -> None:
    cluster = rayjob("rcot_seg_3b_2x8gpu", "cluster.metrics_port=8090")["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert group["rayStartParams"]["metrics-export-port"] == "8090"
        assert group["template"]["metadata"]["annotations"]["prometheus.io/port"] == "8090"
        ports = group["template"]["spec"]["containers"][0]["ports"]
        assert {"name": "metrics", "containerPort": 8090} in ports
    # KubeRay's head service has only the ports that its container names, once it names any
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert {port["name"] for port in head} == {"metrics", "gcs-server", "dashboard", "client"}


def test_a_key_that_the_schema_lacks_is_reported() -> None:
    job = rayjob("rcot_seg_3b")
    job["spec"]["backOffLimit"] = job["spec"].pop("backoffLimit")
    job["spec"]["ttlSecondsAfterFinished"] = "3600"
    cluster = job["spec"]["rayClusterSpec"]
    del cluster["workerGroupSpecs"][0]["groupName"]
    cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] = 0
    cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    text = " ".join(faults(job, SCHEMA, "RayJob"))
    for fault in (
        "backOffLimit is unknown",
        "ttlSecondsAfterFinished is '3600', no integer",
        "workerGroupSpecs.0.groupName is missing",
        "num-gpus is 0, no string",
        "containers.0.volumeMount is unknown",
    ):
        assert fault in text


@pytest.mark.parametrize(
    "notes", ["", "två rader\nmed  blanksteg \t\n\n", "a: b # c\n  |-\n'x' \"y\""]
)
@pytest.mark.parametrize("name", ["laptop", "rcot_seg_3b", "rcot_seg_7b"])
def test_the_recipe_is_a_readable_block_that_reads_back_equal(name: str, notes: str) -> None:
    objects = kuberay.manifest(load_recipe(name, [f"wandb.notes={json.dumps(notes)}"]))
    text = kuberay.text(objects)
    assert list(yaml.safe_load_all(text)) == objects
    assert "  recipe.yaml: |\n    name: " in text, "a literal block, one key a line"
    (recipe,) = [o["data"]["recipe.yaml"] for o in objects if o["kind"] == "ConfigMap"]
    assert yaml.safe_load(recipe)["wandb"]["notes"] == notes
    lines = set(text.splitlines())
    assert all(not line or f"    {line}" in lines for line in recipe.splitlines())
