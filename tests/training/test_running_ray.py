"""A running Ray on several hosts: options of ray.init, and the number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training.jobs import ranks_of
from rcot_rl.training.verl_config import grpo_config

AMOUNTS = ("num_cpus", "num_gpus", "object_store_memory")
"""What ray.init refuses together with the address of a running Ray."""

PATHS = {"model": Path("/m"), "train": [Path("/t")], "val": [Path("/v")], "out": Path("/o")}


def _init(*overrides: str) -> dict:
    recipe = load_recipe("laptop", ["cluster.object_store_bytes=100000000", *overrides])
    return dict(grpo_config(recipe, "grpo-aks", **PATHS).ray_kwargs.ray_init)


@pytest.mark.parametrize("address", ["auto", "10.77.0.1:20000"])
def test_a_running_ray_gets_no_amounts(address):
    options = _init(f"cluster.ray_address={address}")
    assert options["address"] == address
    assert [a for a in AMOUNTS if options.get(a) is not None] == []


def test_a_local_ray_gets_all_amounts():
    options = _init()
    assert options["address"] == "local"
    assert [options[a] for a in AMOUNTS] == [32, 1, 100000000]


def test_the_metrics_port_is_set_only_where_this_run_starts_ray():
    assert _init("cluster.metrics_port=8090")["_metrics_export_port"] == 8090
    running = _init("cluster.metrics_port=8090", "cluster.ray_address=auto")
    assert "_metrics_export_port" not in running
    assert "_metrics_export_port" not in _init()


@pytest.mark.parametrize(("port", "silent"), [("null", True), ("8090", False)])
def test_engines_count_for_prometheus_only_with_a_metrics_port(port, silent):
    recipe = load_recipe("laptop", [f"cluster.metrics_port={port}"])
    config = grpo_config(recipe, "grpo-aks", **PATHS | {"out": Path("/run/grpo-aks")})
    assert config.actor_rollout_ref.rollout.disable_log_stats is silent
    file = config.trainer.rcot.get("prometheus")
    assert file == (None if silent else "/run/tracking/prometheus/grpo-aks.json")


@pytest.mark.parametrize("port", [8265, 10002, 31999])
def test_a_metrics_port_among_rays_own_is_refused(port):
    with pytest.raises(InputError, match=r"cluster\.metrics_port: is used by Ray"):
        load_recipe("laptop", [f"cluster.metrics_port={port}"])


def test_sft_has_the_ranks_of_one_host_and_grpo_those_of_all():
    sizes = ["cluster.nodes=2", "cluster.gpus_per_node=4", "cluster.ray_address=auto"]
    micro = ["train.sft.micro_batch_size=4", "grpo.micro_batch_size=16"]
    recipe = load_recipe("laptop", [*sizes, *micro])
    assert ranks_of(recipe, "sft") == 4
    assert ranks_of(recipe, "grpo-aks") == ranks_of(recipe, "grpo-ktg") == 8
