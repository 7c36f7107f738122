"""Submit a run to KubeRay: a RayJob (ray.io/v1), its recipe and, if requested, its volume claim.

The GPU group has cluster.nodes pods, the CPU group runs agents and rewards, the head has no GPUs.
Stages next to the driver (CoT-SFT, predictions) need GPUs: the driver then runs in a GPU pod,
selected by a custom resource. All pods mount one claim, which holds RUN; relative paths start
there.

The recipe travels resolved, in a ConfigMap: the only user text that reaches a shell is RUN's path,
which must need no quotes. Secrets are references to a Secret. A retried RayJob resumes its run.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from cluster.launch import render
from rcot_rl import __version__
from rcot_rl.errors import InputError
from rcot_rl.recipe.launch_section import PodSection
from rcot_rl.recipe.loader import dump_for_driver
from rcot_rl.recipe.schema import Recipe

_RECIPE_FOLDER = Path("/etc/rcot")
_DRIVER = "rcot_driver"
_LABEL = {"app.kubernetes.io/name": "rcot-rl"}
_HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
"""KubeRay's names and Ray's defaults."""


def manifest(recipe: Recipe) -> list[dict[str, Any]]:
    """Render the objects to apply, in order. Raises InputError."""
    kube = recipe.launch.kuberay
    mount, run = Path(kube.mount), run_folder(recipe)
    workdir = Path(recipe.launch.workdir or mount)
    if mount not in run.parents:
        raise InputError(
            f"makes {run}, which is not below {mount}, where the claim is mounted",
            key="launch.run_dir" if recipe.launch.run_dir else "launch.workdir",
        )
    name = object_name(recipe.name)
    objects = [_config_map(recipe, name), _ray_job(recipe, name, workdir, run)]
    if kube.claim_size is not None:
        objects.insert(0, _claim(recipe))
    return objects


def run_folder(recipe: Recipe) -> Path:
    """Return RUN in a pod."""
    return render.run_folder(recipe, Path(recipe.launch.workdir or recipe.launch.kuberay.mount))


def text(objects: list[dict[str, Any]]) -> str:
    """Render objects as YAML documents, for kubectl; the recipe is readable as a literal block."""
    return yaml.dump_all(objects, Dumper=_BlockDumper, sort_keys=False, allow_unicode=True)


class _BlockDumper(yaml.SafeDumper):
    """Writes texts of several lines as literal blocks (`|`)."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_BlockDumper.add_representer(str, _represent_text)


def submit(recipe: Recipe, objects: list[dict[str, Any]]) -> str:
    """Apply objects with kubectl. Raises InputError."""
    namespace = recipe.launch.kuberay.namespace
    # a running RayJob's spec cannot change: `create` fails, `apply` would change parts of it
    outputs = []
    for item in objects:
        verb = "create" if item["kind"] == "RayJob" else "apply"
        command = ["kubectl", "--namespace", namespace, verb, "--filename", "-"]
        missing, action = "write the manifest with --dry-run", f"kubectl {verb} {item['kind']}"
        outputs.append(render.run_client(command, missing, action, input=yaml.safe_dump(item)))
    return "\n".join(outputs)


def object_name(name: str) -> str:
    """Return a recipe's name as an RFC 1123 label, short enough for KubeRay. Raises InputError."""
    label = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:40].strip("-")
    if not label:
        raise InputError(f"'{name}' leaves no name for a Kubernetes object", key="name")
    return label if label.startswith("rcot-") else f"rcot-{label}"


def _ray_job(recipe: Recipe, name: str, workdir: Path, run: Path) -> dict[str, Any]:
    kube = recipe.launch.kuberay
    others = _cores(kube.head.cpu) + kube.cpu.replicas * _cores(kube.cpu.cpu)
    render.check_cpus(recipe, _cores(kube.gpu.cpu), others, "launch.kuberay.gpu.cpu")
    groups = [_group(recipe, name, "gpu", kube.gpu, recipe.cluster.nodes, gpus=True)]
    if kube.cpu.replicas:
        groups.append(_group(recipe, name, "cpu", kube.cpu, kube.cpu.replicas, gpus=False))
    nodes = 1 + sum(g["replicas"] for g in groups)
    driver = {"entrypointResources": json.dumps({_DRIVER: 1})}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(recipe, name),
        "spec": {
            "entrypoint": _entrypoint(recipe, workdir, run, nodes),
            **(driver if render.driver_needs_gpus(recipe) else {}),
            "submissionMode": kube.submission,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": kube.ttl_s,
            "activeDeadlineSeconds": kube.deadline_s,
            "backoffLimit": kube.backoff_limit,
            "rayClusterSpec": {
                "rayVersion": importlib.metadata.version("ray"),
                "headGroupSpec": {
                    "rayStartParams": _start(recipe, gpus=False) | {"dashboard-host": "0.0.0.0"},
                    "template": _pod(recipe, name, "ray-head", kube.head, gpus=False),
                },
                "workerGroupSpecs": groups,
            },
        },
    }


def _cores(quantity: str) -> float:
    """Return the CPUs of a Kubernetes quantity such as 4 or 500m."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def _entrypoint(recipe: Recipe, workdir: Path, run: Path, nodes: int) -> str:
    health = render.health_options(recipe, run.parent, nodes, recipe.cluster.nodes)
    command = render.run_command("python", str(_RECIPE_FOLDER / "recipe.yaml"), [], run)
    chdir = f"--chdir={workdir}"
    words = ["python", "-m", "cluster.launch.head", chdir, *health, "--", *command]
    for word in words:
        if shlex.quote(word) != word:  # two shells read KubeRay's entrypoint
            raise InputError(
                f"makes the word '{word}', which a shell does not take literally; use letters, "
                "digits, and ./_-",
                key="launch.run_dir" if recipe.launch.run_dir else "launch.workdir",
            )
    return " ".join(words)


def _group(
    recipe: Recipe, name: str, group: str, pod: PodSection, replicas: int, *, gpus: bool
) -> dict[str, Any]:
    return {
        "groupName": group,
        # all the same: a training job cannot use a node that joins later
        "replicas": replicas,
        "minReplicas": replicas,
        "maxReplicas": replicas,
        "rayStartParams": _start(recipe, gpus=gpus),
        "template": _pod(recipe, name, "ray-worker", pod, gpus=gpus),
    }


def _start(recipe: Recipe, *, gpus: bool) -> dict[str, str]:
    """Return the parameters of `ray start`. On CPUs, GPUs are logical: verl places by GPUs."""
    params = {"num-gpus": str(recipe.cluster.gpus_per_node if gpus else 0)}
    if gpus:  # quoted twice: KubeRay passes the value to a shell
        params["resources"] = json.dumps(json.dumps({_DRIVER: 1}))
    if recipe.cluster.object_store_bytes is not None:
        params["object-store-memory"] = str(recipe.cluster.object_store_bytes)
    if recipe.cluster.metrics_port is not None:
        params["metrics-export-port"] = str(recipe.cluster.metrics_port)
    return params


def _pod(
    recipe: Recipe, name: str, container: str, pod: PodSection, *, gpus: bool
) -> dict[str, Any]:
    kube = recipe.launch.kuberay
    amounts: dict[str, Any] = {"cpu": pod.cpu, "memory": pod.memory}
    if gpus and recipe.device == "cuda":
        amounts[kube.gpu_resource] = str(recipe.cluster.gpus_per_node)
    spec: dict[str, Any] = {
        "containers": [
            {
                "name": container,
                "image": kube.image or f"rcot-rl:{__version__}",
                "env": _environment(recipe),
                "envFrom": [{"secretRef": {"name": n}} for n in kube.env_from],
                # requests equal to limits: the pod is evicted last
                "resources": {"requests": dict(amounts), "limits": dict(amounts)},
                "volumeMounts": [
                    {"name": "run", "mountPath": kube.mount},
                    {"name": "recipe", "mountPath": str(_RECIPE_FOLDER), "readOnly": True},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "run", "persistentVolumeClaim": {"claimName": kube.claim}},
            {"name": "recipe", "configMap": {"name": name}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": pod.shm}},
        ],
    }
    if pod.node_selector:
        spec["nodeSelector"] = dict(pod.node_selector)
    if pod.tolerations:
        spec["tolerations"] = [t.model_dump(exclude_none=True) for t in pod.tolerations]
    if kube.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": n} for n in kube.image_pull_secrets]
    if kube.service_account:
        spec["serviceAccountName"] = kube.service_account
    metadata: dict[str, Any] = {"labels": dict(_LABEL)}
    port = recipe.cluster.metrics_port
    if port is not None:
        # the head's service has the ports that its container names, or else all of Ray's
        ports = {"metrics": port} | (_HEAD_PORTS if container == "ray-head" else {})
        named = [{"name": name, "containerPort": number} for name, number in ports.items()]
        spec["containers"][0]["ports"] = named
        metadata["annotations"] = {
            "prometheus.io/scrape": "true",
            "prometheus.io/port": str(port),
            "prometheus.io/path": "/metrics",
        }
    return {"metadata": metadata, "spec": spec}


def _environment(recipe: Recipe) -> list[dict[str, Any]]:
    values = {"RCOT_RL_PLUGIN": "required", "RAY_USAGE_STATS_ENABLED": "0"}
    values |= recipe.launch.environment
    entries: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in values.items()]
    secret = recipe.launch.kuberay.secret
    for name in recipe.launch.secrets:
        reference = {"name": secret, "key": name}
        entries.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    return entries


def _config_map(recipe: Recipe, name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(recipe, name),
        "data": {"recipe.yaml": dump_for_driver(recipe)},
    }


def _metadata(recipe: Recipe, name: str) -> dict[str, Any]:
    namespace = recipe.launch.kuberay.namespace
    return {"name": name, "namespace": namespace, "labels": dict(_LABEL)}


def _claim(recipe: Recipe) -> dict[str, Any]:
    kube = recipe.launch.kuberay
    spec: dict[str, Any] = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": kube.claim_size}},
    }
    if kube.storage_class:
        spec["storageClassName"] = kube.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(recipe, kube.claim),
        "spec": spec,
    }
