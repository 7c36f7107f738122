"""The preflight's checks of this host and of the run's folder: what is free, what answers."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.launch.render import held_cpus
from cluster.preflight import at_start as preflight
from cluster.preflight.checks.case import GIB, Case, existing
from cluster.preflight.checks.estimates import object_store
from cluster.preflight.checks.findings import Notes
from rcot_rl import variables
from rcot_rl.checkout import commit_of, is_checkout
from rcot_rl.errors import InputError
from rcot_rl.paths import check_path

_SOCKET = "/rcot-01234567/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
_SOCKET_MOST = 107
"""Bytes of a Unix socket's path, on Linux."""


def folder(case: Case, notes: Notes) -> None:
    """RUN can be made or written, and is this recipe's."""
    with notes.attempt(
        "folder.name", cost="files of another folder read in place of the run's own",
        fix="choose a folder without these characters, with --out",
    ):  # fmt: skip
        check_path(case.root, handed_on=True)
    place = existing(case.root)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        unwritable(notes, f"{place}: cannot be written")
        return
    with notes.attempt(
        "folder.recipe", cost="stages of two recipes in one folder",
        fix="choose another folder with --out",
    ):  # fmt: skip
        preflight.check_folder(case.root, case.recipe)


def unwritable(notes: Notes, says: str) -> None:
    """A run's folder that cannot be."""
    notes.error(
        "folder.writable", says, cost="a run that cannot begin",
        fix="choose another folder with --out, or give yourself the right to write it",
    )  # fmt: skip


def home(case: Case, notes: Notes) -> None:
    """Libraries have a folder for caches and settings."""
    for says in variables.notes():
        notes.warning(
            "home", says, cost="models loaded and kernels compiled again in every container",
            fix="set HOME to a folder that lasts and that you can write; or HF_HOME for models",
        )  # fmt: skip


def versions(case: Case, notes: Notes) -> None:
    """What is installed is what the lock pins."""
    from rcot_rl.doctor import examine

    faults = examine()
    if not faults:
        return
    more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    notes.warning(
        "versions", faults[0] + more, cost="a fault nobody else can repeat",
        fix=f"`{preflight.setup_of(case.recipe.device)}` installs the lock; `rcot doctor` lists "
        "every difference",
    )  # fmt: skip


def provenance(case: Case, notes: Notes) -> None:
    """Git tells which commit runs; where the code is no checkout, nobody expects it to."""
    if not is_checkout():
        return
    try:
        commit_of()
    except InputError as error:
        notes.warning(
            "git", str(error), cost="a result that no commit explains",
            fix="do what the message says, before the run: its folder is written with the commit",
        )  # fmt: skip


def attention(case: Case, notes: Notes) -> None:
    """flash-attn, which no lock has, is there when the trainer is to use it."""
    wanted = case.recipe.models.attention
    if case.training and wanted != "sdpa" and importlib.util.find_spec("flash_attn") is None:
        notes.error(
            "attention", f"models.attention={wanted}: the package flash-attn is not installed",
            cost="an import error in every trainer rank, after the GPUs are held",
            fix="models.attention=sdpa, or compile flash-attn for the locked torch",
        )  # fmt: skip


def accounts(case: Case, notes: Notes) -> None:
    """W&B's mode, credentials and project name."""
    if not case.training:
        return
    wandb = case.recipe.wandb
    with notes.attempt(
        "wandb", cost="a trainer that stops at a login prompt",
        fix="run `wandb login`, or set wandb.mode=offline",
    ):  # fmt: skip
        preflight.check_wandb(case.recipe)
    key = os.environ.get("WANDB_API_KEY")
    if wandb.mode == "online" and key and (len(key) < 40 or key != key.strip()):
        notes.error(
            "wandb.key", f"WANDB_API_KEY has {len(key)} characters; W&B's keys have 40 or more, "
            "and no blanks around them", cost="a refused login, minutes into the first stage",
            fix="copy the key again",
        )  # fmt: skip
    if wandb.mode != "disabled" and (re.search(r"[/\\#?%:]", wandb.project) or not wandb.project):
        notes.error(
            "wandb.project", f"wandb.project: {wandb.project!r} is no name that W&B takes (none of "
            "/ \\ # ? % :)", cost="a trainer that stops when it first logs",
            fix="rename wandb.project",
        )  # fmt: skip


def ray(case: Case, notes: Notes) -> None:
    """Ray's address answers, its sockets' paths fit, and fixed ports are free."""
    if not case.grpo:
        return
    with notes.attempt(
        "ray", cost="minutes of waiting for a cluster that is not there",
        fix="unset RAY_ADDRESS, or name that Ray in cluster.ray_address"
        if case.recipe.cluster.ray_address == "local"
        else "cluster.ray_address=local starts a Ray of its own; else name a head that runs",
    ):  # fmt: skip
        preflight.check_ray(case.recipe)
    with notes.attempt(
        "engine", cost="an import error in a rollout worker",
        fix=f"`{preflight.setup_of(case.recipe.device)}` installs it; or choose the other device",
    ):  # fmt: skip
        preflight.check_rollout_engine(case.recipe)
    where = tempfile.gettempdir()
    if case.recipe.cluster.ray_address == "local" and len(where + _SOCKET) > _SOCKET_MOST:
        notes.error(
            "ray.tmpdir", f"TMPDIR={where}: Ray's sockets below it would have paths of "
            f"{len(where + _SOCKET)} bytes, and {_SOCKET_MOST} are possible",
            cost="a Ray that does not start", fix="set TMPDIR to a shorter path, such as /tmp",
        )  # fmt: skip
    _ports(case, notes)


def _ports(case: Case, notes: Notes) -> None:
    """Ports that the recipe fixes (others are chosen free when a run starts)."""
    for stage in case.grpo:
        for key, port in _leaves(case.recipe.grpo(stage).verl):
            if key.rpartition(".")[2].endswith("port") and type(port) is int and port > 0:
                if port > 65535:
                    said = "is no port"
                elif _taken(port):
                    said = "is taken on this host"
                else:
                    continue
                notes.error(
                    f"{stage}.ports", f"{stage.replace('-', '_')}.verl: {key}={port} {said}",
                    cost="a service that fails to bind, minutes into the start",
                    fix="leave the key out, so that a free port is chosen, or take another",
                )  # fmt: skip


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def devices(case: Case, notes: Notes) -> None:
    """GPUs that are visible here, and CPUs for the workers that verl asks Ray for."""
    recipe, cluster = case.recipe, case.recipe.cluster
    if cluster.nodes > 1 and cluster.ray_address == "local":
        notes.error(
            "nodes", f"cluster.nodes={cluster.nodes}, but ray_address=local starts one host",
            cost="a trainer that waits for ever",
            fix="start Ray on all hosts (`rcot launch` does) and name it in cluster.ray_address",
        )  # fmt: skip
    here = cluster.ray_address == "local" and bool(case.training)
    if recipe.device == "cuda" and here:
        for says in _visible(case):
            notes.error(
                "devices", says, cost="a crash at start, or a wait for GPUs that never come",
                fix="set cluster.gpus_per_node to the number that is visible here, or let "
                "CUDA_VISIBLE_DEVICES show more",
            )  # fmt: skip
        if case.host.gpus is None and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
            notes.unknown(
                "devices", "no nvidia-smi here: GPUs were not counted",
                cost="a crash at start", fix="run the preflight on the host that has the GPUs",
            )  # fmt: skip
        _placement(case, notes)


def _visible(case: Case) -> Iterator[str]:
    asked, listed = case.recipe.cluster.gpus_per_node, os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed == "":
        yield "CUDA_VISIBLE_DEVICES is empty: no GPU is visible"
    elif listed is not None and len(listed.split(",")) < asked:
        yield f"CUDA_VISIBLE_DEVICES={listed} shows fewer than cluster.gpus_per_node={asked} GPUs"
    elif case.host.gpus is not None and case.host.gpus < asked and listed is not None:
        yield (
            f"CUDA_VISIBLE_DEVICES={listed} names {case.host.gpus} of the GPUs that nvidia-smi "
            f"lists here, and cluster.gpus_per_node={asked}"
        )
    elif case.host.gpus is not None and case.host.gpus < asked:
        yield f"cluster.gpus_per_node={asked}, and nvidia-smi lists {case.host.gpus} here"


def _placement(case: Case, notes: Notes) -> None:
    """verl holds CPUs for each GPU and each storage unit, and waits until it has them; workers of
    agents and rewards begin with one and share what is left."""
    if not case.grpo:
        return
    cluster, cpus = case.recipe.cluster, case.host.cpus
    _, wanted = held_cpus(case.recipe)
    workers = cluster.agent_workers + cluster.reward_workers
    if wanted > cpus:
        notes.error(
            "placement", f"cluster: verl holds {wanted} CPUs (3 x {cluster.gpus_per_node} GPUs, "
            f"{cluster.queue_storage_units} storage units, 1 more); this host has {cpus}",
            cost="a trainer that waits for ever, without a word",
            fix=_fewer_cpus(3 * cluster.gpus_per_node, cpus),
        )  # fmt: skip
    elif wanted + workers > cpus:
        notes.warning(
            "placement", f"cluster: {cluster.agent_workers} agent and {cluster.reward_workers} "
            f"reward workers share {cpus - wanted} CPUs: verl holds {wanted} of this host's {cpus}",
            cost="rollouts that wait for their pictures and rewards",
            fix="lower cluster.agent_workers and reward_workers" if wanted + 2 <= cpus
            else f"a host of {wanted + 2} CPUs or more, and 1 agent and 1 reward worker",
        )  # fmt: skip


def _fewer_cpus(pools: int, cpus: int) -> str:
    """What makes verl hold no more than `cpus`: pools: what its GPUs take."""
    if pools + 2 <= cpus:
        return f"cluster.queue_storage_units={cpus - pools - 1}"
    gpus = (cpus - 2) // 3
    fewer = f"cluster.gpus_per_node={gpus} and cluster.queue_storage_units=1, or " if gpus else ""
    return f"{fewer}a host of {pools + 2} CPUs or more, with cluster.queue_storage_units=1"


def shared_memory(case: Case, notes: Notes) -> None:
    """Ray's object store fits into /dev/shm."""
    asked, shm = case.recipe.cluster.object_store_bytes, case.host.shm_bytes
    if not case.grpo or case.recipe.cluster.ray_address != "local":
        return
    if asked is not None and asked > case.host.ram_bytes:
        notes.error(
            "ray.object_store", f"cluster.object_store_bytes={asked} is more than this host's "
            f"{case.host.ram_bytes / GIB:.1f} GiB", cost="a Ray that does not start",
            fix="lower cluster.object_store_bytes; a laptop's run needs 200000000",
        )  # fmt: skip
        return
    store, said = object_store(case)
    if shm is not None and shm < store * GIB:
        notes.warning(
            "ray.shm", f"/dev/shm has {shm / GIB:.2f} GiB, and Ray's object store takes "
            f"{store:.2f} ({said}): it falls back to files", cost="rollouts at the disk's speed",
            fix="give the container more (docker run --shm-size), or lower "
            "cluster.object_store_bytes",
        )  # fmt: skip


def space(case: Case, notes: Notes) -> None:
    """The disk has room for anything at all; what checkpoints need is `checks_size`'."""
    with notes.attempt(
        "disk", cost="a run that dies at its first file", fix="free space, or choose another --out",
    ):  # fmt: skip
        preflight.check_disk(Path(existing(case.root)), case.host.disk_free_bytes)
