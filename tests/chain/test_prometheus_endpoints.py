"""Endpoints for Prometheus of a run on the real stack, scraped while it trains."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

NAMES = Path(__file__).parent / "prometheus_names.json"
"""Names that Ray's and vLLM's endpoints serve, which the Grafana dashboard is checked against."""

GPU = ("ray_node_gpus_", "ray_node_gram_")
"""Prefixes of what Ray serves only on a host with a GPU."""

_NAME = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)[{ ]", re.MULTILINE)


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        return reply.read().decode()


def scraped(targets: Path) -> tuple[dict[str, set[str]], list[dict]]:
    """Return the names that the endpoints of a file of targets serve, by job, and its content."""
    groups = json.loads(targets.read_text())
    pages = {g["labels"]["job"]: "".join(map(scrape, g["targets"])) for g in groups}
    return {job: set(_NAME.findall(page)) for job, page in pages.items()}, groups


def test_ray_and_the_engine_are_scraped_while_a_stage_trains(branch, start_rcot, dashboard_names):
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    settings = [f"cluster.metrics_port={port}", "train.grpo-aks.steps=6"]
    folder, words = branch("run", "grpo-aks", *settings)
    targets = folder / "tracking" / "prometheus" / "grpo-aks.json"
    log = folder.parent / "console.txt"
    process = start_rcot(*words, stdout=-3, stderr=log.open("w"))
    names: dict[str, set[str]] = {}
    groups: list[dict] = []
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        if targets.is_file():
            with contextlib.suppress(OSError):  # the stage ends just now
                names, groups = scraped(targets)
        time.sleep(0.5)
    assert process.wait(timeout=60) == 0, log.read_text()[-3000:]
    assert not targets.exists(), "nothing answers there any more"
    assert [group["labels"]["job"] for group in groups] == ["ray", "vllm"]
    assert [target.rpartition(":")[2] for target in groups[0]["targets"]] == [str(port)]
    if os.environ.get("RCOT_WRITE_GOLDEN"):
        served = {job: sorted(of_job) for job, of_job in names.items()}
        NAMES.write_text(json.dumps(served, indent=1) + "\n", encoding="utf-8")
    shown = {name for name in dashboard_names if not name.startswith(GPU)}
    assert shown <= names["ray"] | names["vllm"]
    assert set(json.loads(NAMES.read_text())["vllm"]) == names["vllm"]
