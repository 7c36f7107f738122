"""The connection to Ray for batch work: predictions, descriptions and traces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rcot_rl.recipe.schema import Recipe

_VLLM = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}
LOGICAL_CPUS = 8
"""CPUs declared to Ray on a CPU host, where the processes share the few real ones."""


@contextmanager
def ray_session(recipe: Recipe, cpus: int = LOGICAL_CPUS) -> Iterator[None]:
    """Connect to Ray as the recipe's cluster section says; stop it if it was started here.

    Args:
        cpus: CPUs declared to a Ray that is started on a CPU host.
    """
    import ray

    environment = dict(_VLLM)
    if recipe.device == "cpu":
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    runtime: dict[str, Any] = {"env_vars": environment}
    address = recipe.cluster.ray_address
    arguments: dict[str, Any] = {"log_to_driver": False}
    if address == "local":
        arguments |= {"include_dashboard": False}
        if recipe.device == "cpu":
            arguments["num_cpus"] = cpus
            if "RCOT_ZYGOTE_PYTHON" in os.environ:
                runtime["py_executable"] = os.environ["RCOT_ZYGOTE_PYTHON"]
        if recipe.cluster.object_store_bytes is not None:
            arguments["object_store_memory"] = recipe.cluster.object_store_bytes
        if recipe.cluster.metrics_port is not None:
            arguments["_metrics_export_port"] = recipe.cluster.metrics_port
    ray.init(address=address, runtime_env=runtime, **arguments)
    try:
        yield
    finally:
        ray.shutdown()
