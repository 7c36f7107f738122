"""The preflight's checks of this host and of the run folder."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.launch.render import held_cpus
from cluster.preflight import at_start
from cluster.preflight.checks.case import GIB, RunCase, existing
from cluster.preflight.checks.estimates import object_store
from cluster.preflight.checks.findings import Notes
from rcot_rl.errors import InputError
from rcot_rl.monitoring.trackers.tracker_choice import KEY as TRACKERS
from rcot_rl.monitoring.trackers.tracker_choice import MODULE as TRACKER_CHECK
from rcot_rl.monitoring.trackers.tracker_choice import choices, name_of, source_of
from rcot_rl.runfolder import RunFolder
from rcot_rl.system import variables
from rcot_rl.system.checkout import commit_of, is_checkout
from rcot_rl.system.paths import check_path

_SOCKET = "/rcot-01234567/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
_LOAD_S = 120.0
"""Seconds that a user's tracker may take to load: it may import large packages."""
_SOCKET_MOST = 107
"""Most bytes of a Unix socket's path on Linux."""


def folder(case: RunCase, notes: Notes) -> None:
    """Check that the run folder can be written, and belongs to this recipe."""
    with notes.attempt(
        "folder.name",
        cost="files of another folder read in place of the run's own",
        fix="choose a folder without these characters, with --out",
    ):
        check_path(case.root, handed_on=True)
    place = existing(case.root)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        unwritable(notes, f"{place}: cannot be written")
        return
    refusal = RunFolder(case.root).refusal(case.recipe)
    if refusal is not None:
        notes.error(
            "folder.recipe",
            f"{refusal.file}: {refusal.message}",
            cost="stages of two recipes in one folder",
            fix=refusal.fix,
        )


def unwritable(notes: Notes, message: str) -> None:
    """Note that the run folder cannot be written."""
    notes.error(
        "folder.writable",
        message,
        cost="a run that cannot start",
        fix="choose another folder with --out, or get write permission",
    )


def home(case: RunCase, notes: Notes) -> None:
    """Check that libraries have a folder for caches and settings."""
    for message in variables.notes():
        notes.warning(
            "home",
            message,
            cost="models loaded and kernels compiled again in every container",
            fix="set HOME to a persistent, writable folder; or HF_HOME for models",
        )


def versions(case: RunCase, notes: Notes) -> None:
    """Check that the installed packages are those that the lock pins."""
    from rcot_rl.system.doctor import examine

    faults = examine()
    if not faults:
        return
    more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    notes.warning(
        "versions",
        faults[0] + more,
        cost="a fault that nobody else can reproduce",
        fix=f"`{at_start.setup_of(case.recipe.device)}` installs the lock; `rcot doctor` lists "
        "every difference",
    )


def provenance(case: RunCase, notes: Notes) -> None:
    """Check that git reports the commit, if the code is a checkout."""
    if not is_checkout():
        return
    try:
        commit_of()
    except InputError as error:
        notes.warning(
            "git",
            str(error),
            cost="a result that no commit explains",
            fix="do what the message says before the run, which records the commit",
        )


def attention(case: RunCase, notes: Notes) -> None:
    """Check that flash-attn, which no lock has, is installed if the trainer uses it."""
    attention = case.recipe.models.attention
    if case.training and attention != "sdpa" and importlib.util.find_spec("flash_attn") is None:
        notes.error(
            "attention",
            f"models.attention={attention}: the package flash-attn is not installed",
            cost="an import error in every trainer rank, after the GPUs are allocated",
            fix="models.attention=sdpa, or compile flash-attn for the locked torch",
        )


def accounts(case: RunCase, notes: Notes) -> None:
    """Check W&B's mode, credentials and project name."""
    if not case.training:
        return
    wandb = case.recipe.wandb
    with notes.attempt(
        "wandb",
        cost="a run that is not sent",
        fix="run `wandb login`, or set wandb.mode=offline",
    ):
        at_start.check_wandb(case.recipe)
    key = os.environ.get("WANDB_API_KEY")
    if wandb.mode == "online" and key and (len(key) < 40 or key != key.strip()):
        notes.error(
            "wandb.key",
            f"WANDB_API_KEY has {len(key)} characters; W&B's keys have 40 or more, and no blanks "
            "around them",
            cost="a refused login, and a run that is not sent",
            fix="copy the key again",
        )
    if wandb.mode != "disabled" and (re.search(r"[/\\#?%:]", wandb.project) or not wandb.project):
        notes.error(
            "wandb.project",
            f"wandb.project: W&B does not accept the name {wandb.project!r} (none of / \\ # ? % :)",
            cost="a run that W&B refuses",
            fix="rename wandb.project",
        )


def trackers(case: RunCase, notes: Notes) -> None:
    """Check that the user's trackers load, each in a process of its own."""
    names = Counter(map(name_of, choices(case.recipe)))
    for choice in case.recipe.tracking.others:
        with notes.attempt(
            "tracking.others",
            cost="a run that is not tracked there",
            fix="name FILE.py:CLASS, a complete subclass of Tracker (docs/monitoring.md)",
        ):
            if names[name_of(choice)] > 1:
                raise InputError(f"two trackers are named {name_of(choice)}", key=TRACKERS)
            path, _ = source_of(choice)
            words = [sys.executable, "-m", TRACKER_CHECK, choice]
            try:
                check = subprocess.run(words, capture_output=True, text=True, timeout=_LOAD_S)
            except subprocess.TimeoutExpired as error:
                raise InputError(f"did not load within {_LOAD_S:.0f} s", file=path) from error
            if check.returncode != 0:
                lines = check.stderr.strip().splitlines() or ["its process crashed"]
                raise InputError(lines[-1], key=TRACKERS)


def ray(case: RunCase, notes: Notes) -> None:
    """Check Ray's address, the length of its sockets' paths, and fixed ports."""
    if not case.grpo:
        return
    with notes.attempt(
        "ray",
        cost="minutes of waiting for a cluster that does not exist",
        fix="unset RAY_ADDRESS, or name that Ray in cluster.ray_address"
        if case.recipe.cluster.ray_address == "local"
        else "cluster.ray_address=local starts a Ray of its own; else name a head that runs",
    ):
        at_start.check_ray(case.recipe)
    with notes.attempt(
        "engine",
        cost="an import error in a rollout worker",
        fix=f"`{at_start.setup_of(case.recipe.device)}` installs it; or choose the other device",
    ):
        at_start.check_rollout_engine(case.recipe)
    where = tempfile.gettempdir()
    if case.recipe.cluster.ray_address == "local" and len(where + _SOCKET) > _SOCKET_MOST:
        notes.error(
            "ray.tmpdir",
            f"TMPDIR={where}: Ray's sockets below it would have paths of {len(where + _SOCKET)} "
            f"bytes, and {_SOCKET_MOST} are possible",
            cost="a Ray that does not start",
            fix="set TMPDIR to a shorter path, such as /tmp",
        )
    _ports(case, notes)


def _ports(case: RunCase, notes: Notes) -> None:
    """Check ports that the recipe fixes; others are chosen when a run starts."""
    port, own_ray = case.recipe.cluster.metrics_port, case.recipe.cluster.ray_address == "local"
    if own_ray and port is not None and _taken(port):
        notes.error(
            "ray.metrics_port",
            f"cluster.metrics_port={port} is taken on this host, perhaps by another run",
            cost="a Ray whose metrics nobody can read",
            fix="choose another port, or remove the key",
        )
    for stage in case.grpo:
        for key, port in _leaves(case.recipe.grpo(stage).verl):
            if key.rpartition(".")[2].endswith("port") and type(port) is int and port > 0:
                if port > 65535:
                    fault = "is no port"
                elif _taken(port):
                    fault = "is taken on this host"
                else:
                    continue
                notes.error(
                    f"{stage}.ports",
                    f"train.{stage}.verl: {key}={port} {fault}",
                    cost="a service that fails to bind, minutes into the start",
                    fix="remove the key, so that a free port is chosen, or take another",
                )


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


def devices(case: RunCase, notes: Notes) -> None:
    """Check visible GPUs, and CPUs for the workers that verl asks Ray for."""
    recipe, cluster = case.recipe, case.recipe.cluster
    if cluster.nodes > 1 and cluster.ray_address == "local":
        notes.error(
            "nodes",
            f"cluster.nodes={cluster.nodes}, but ray_address=local starts one host",
            cost="a trainer that waits forever",
            fix="start Ray on all hosts (`rcot launch` does) and name it in cluster.ray_address",
        )
    here = cluster.ray_address == "local" and bool(case.training)
    if recipe.device == "cuda" and here:
        for message in _visible(case):
            notes.error(
                "devices",
                message,
                cost="a crash at start, or a wait for GPUs that never come",
                fix="set cluster.gpus_per_node to the number that is visible here, or let "
                "CUDA_VISIBLE_DEVICES show more",
            )
        if case.host.gpus is None and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
            notes.unknown(
                "devices",
                "no nvidia-smi here: GPUs were not counted",
                cost="a crash at start",
                fix="run the preflight on the host that has the GPUs",
            )
        _placement(case, notes)


def _visible(case: RunCase) -> Iterator[str]:
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


def _placement(case: RunCase, notes: Notes) -> None:
    """Check the CPUs of a GRPO stage.

    verl reserves CPUs for each GPU and each storage unit, and waits until it has them. Workers of
    agents and rewards start with one each and share the rest.
    """
    if not case.grpo:
        return
    cluster, cpus = case.recipe.cluster, case.host.cpus
    _, held = held_cpus(case.recipe)
    workers = cluster.agent_workers + cluster.reward_workers
    if held > cpus:
        notes.error(
            "placement",
            f"cluster: verl holds {held} CPUs (3 x {cluster.gpus_per_node} GPUs, "
            f"{cluster.queue_storage_units} storage units, 1 more); this host has {cpus}",
            cost="a trainer that waits forever, silently",
            fix=_fewer_cpus(3 * cluster.gpus_per_node, cpus),
        )
    elif held + workers > cpus:
        notes.warning(
            "placement",
            f"cluster: {cluster.agent_workers} agent and {cluster.reward_workers} "
            f"reward workers share {cpus - held} CPUs: verl holds {held} of this host's {cpus}",
            cost="rollouts that wait for their images and rewards",
            fix="lower cluster.agent_workers and reward_workers"
            if held + 2 <= cpus
            else f"a host of {held + 2} CPUs or more, and 1 agent and 1 reward worker",
        )


def _fewer_cpus(pools: int, cpus: int) -> str:
    """Return the fix with which verl holds no more than `cpus`, of which its GPUs take `pools`."""
    if pools + 2 <= cpus:
        return f"cluster.queue_storage_units={cpus - pools - 1}"
    gpus = (cpus - 2) // 3
    fewer = f"cluster.gpus_per_node={gpus} and cluster.queue_storage_units=1, or " if gpus else ""
    return f"{fewer}a host of {pools + 2} CPUs or more, with cluster.queue_storage_units=1"


def shared_memory(case: RunCase, notes: Notes) -> None:
    """Check that Ray's object store fits into memory and /dev/shm."""
    asked, shm = case.recipe.cluster.object_store_bytes, case.host.shm_bytes
    if not case.grpo or case.recipe.cluster.ray_address != "local":
        return
    if asked is not None and asked > case.host.ram_bytes:
        notes.error(
            "ray.object_store",
            f"cluster.object_store_bytes={asked} is more than this host's "
            f"{case.host.ram_bytes / GIB:.1f} GiB",
            cost="a Ray that does not start",
            fix="lower cluster.object_store_bytes; a laptop's run needs 200000000",
        )
        return
    store, source = object_store(case)
    if shm is not None and shm < store * GIB:
        notes.warning(
            "ray.shm",
            f"/dev/shm has {shm / GIB:.2f} GiB, and Ray's object store takes "
            f"{store:.2f} ({source}): it falls back to files",
            cost="rollouts at the disk's speed",
            fix="give the container more (docker run --shm-size), or lower "
            "cluster.object_store_bytes",
        )


def space(case: RunCase, notes: Notes) -> None:
    """Check that the disk has any room; `size.disk` checks what the run needs."""
    with notes.attempt(
        "disk",
        cost="a run that dies at its first file",
        fix="free space, or choose another --out",
    ):
        at_start.check_disk(Path(existing(case.root)), case.host.disk_free_bytes)
