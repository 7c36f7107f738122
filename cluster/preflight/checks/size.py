"""The preflight's checks of size: GPU memory, host memory and disk against the estimates."""

from __future__ import annotations

import math

from cluster.preflight.checks import estimates
from cluster.preflight.checks.case import GIB, RunCase
from cluster.preflight.checks.findings import Notes
from rcot_rl.recipe.training_section import GrpoStage, SftStage


def known(case: RunCase, notes: Notes) -> None:
    """Note it if nothing can be estimated."""
    if case.training and case.policy.parameters is None:
        notes.unknown(
            "sizes",
            f"models.policy={case.policy.spec}: {case.policy.derivation}, so memory and disk were "
            "not estimated",
            cost="a kill for memory, hours into a stage",
            fix="put the policy on this host, and name its folder",
        )


def gpu(case: RunCase, notes: Notes) -> None:
    """Check the GPU memory of a rank in every training stage; GRPO generates and trains."""
    if case.recipe.device != "cuda" or case.policy.parameters is None:
        return
    for stage in case.sft:
        _sft(case, notes, stage, case.recipe.sft(stage), case.policy.parameters)
    for stage in case.grpo:
        _gpu(case, notes, stage, case.recipe.grpo(stage))


def _sft(case: RunCase, notes: Notes, stage: str, s: SftStage, parameters: int) -> None:
    """Check sharded frozen weights and activations; the adapter is negligible."""
    total, source = case.gpu
    ranks = case.recipe.cluster.gpus_per_node  # SFT runs on one host
    weights = 4 * parameters / ranks / GIB
    active = estimates.activations(case, s.micro_batch_size, s.max_length)
    if active is not None and weights + active.gib + estimates.CONTEXT_GIB > total:
        notes.warning(
            f"{stage}.gpu_activations",
            f"train.{stage}.micro_batch_size={s.micro_batch_size}: activations of at "
            f"most {active} do not fit beside {weights:.1f} GiB of weights (4 bytes x "
            f"{parameters / 1e6:.1f} M / {ranks} ranks) of {total:.0f} GiB ({source})",
            cost="out of memory at the first batch of long rows",
            why=[active.why],
            fix=f"lower train.{stage}.micro_batch_size; the update stays the same",
        )


def _gpu(case: RunCase, notes: Notes, stage: str, g: GrpoStage) -> None:
    total, source = case.gpu
    key, of = f"train.{stage}", f"of {total:.0f} GiB ({source})"
    share = g.gpu_memory_utilization * total
    train, waiting = estimates.states(case, g)
    need = estimates.engine_need(case, g)
    # an assumed size stops no run
    note = notes.error if case.gpu_is_known else notes.warning
    least = math.ceil(100 * need.gib / total) / 100
    if need.gib > share:
        note(
            f"{stage}.gpu_engine",
            f"{key}.gpu_memory_utilization={g.gpu_memory_utilization:g} "
            f"{of} gives vLLM {share:.1f} GiB, and it needs {need}",
            cost="an error when the rollout engine starts, minutes into the stage",
            why=[need.why],
            fix=f"{key}.gpu_memory_utilization={least:.2f}"
            if least <= 0.9
            else f"raise {key}.tensor_parallel_size, or take larger GPUs",
        )
    generating = waiting.gib + share + estimates.CONTEXT_GIB
    most = math.floor(100 * (total - waiting.gib - estimates.CONTEXT_GIB) / total) / 100
    if generating > total:
        note(
            f"{stage}.gpu_rollout",
            f"{key}.gpu_memory_utilization={g.gpu_memory_utilization:g}: "
            f"while it generates, a rank holds vLLM's {share:.1f} GiB and the trainer's {waiting}, "
            f"together more than there is {of}",
            cost="out of memory at the first rollout",
            why=[waiting.why],
            fix=f"{key}.gpu_memory_utilization={most:.2f}"
            if most >= least
            else f"add ranks, or {key}.offload=all and {key}.gpu_memory_utilization={least:.2f}",
        )
    held = 0.0 if estimates.sleeps(g) else share
    step = estimates.optimizer_step(case, g)
    if train.gib + step.gib + held + estimates.CONTEXT_GIB > total:
        note(
            f"{stage}.gpu_states",
            f"cluster: a rank's {train}, and {step},"
            + (f", beside vLLM's {held:.1f} GiB," if held else "")
            + f" are more than there is {of}",
            cost="out of memory at the first update",
            why=[train.why, step.why],
            fix=("leave free_cache_engine out, so that vLLM returns its share; or " if held else "")
            + f"more cluster.gpus_per_node or nodes, or {key}.verl="
            "{actor_rollout_ref.actor.fsdp_config.offload_policy: true}",
        )
        return
    length = g.max_prompt_length + g.max_response_length
    active = estimates.activations(case, g.micro_batch_size, length)
    if active is not None and train.gib + held + active.gib + estimates.CONTEXT_GIB > total:
        notes.warning(
            f"{stage}.gpu_activations",
            f"{key}.micro_batch_size={g.micro_batch_size}: activations "
            f"of at most {active} do not fit beside the trainer's {train.gib:.1f} GiB {of}",
            cost="out of memory at the first batch of long responses",
            why=[active.why],
            fix=f"lower {key}.micro_batch_size; the update stays the same",
        )


def host(case: RunCase, notes: Notes) -> None:
    """Check the host memory of one node in a GRPO stage."""
    if not case.grpo or case.recipe.cluster.ray_address != "local":
        return
    need, facts = estimates.host_memory(case), case.host
    fix = (
        "fewer cluster.agent_workers and reward_workers, a smaller cluster.object_store_bytes, "
        "or a larger host"
    )
    if need.gib * GIB > facts.ram_bytes:
        notes.error(
            "ram",
            f"cluster: a node needs {need}; this host has {facts.ram_bytes / GIB:.1f} GiB",
            cost="a worker that the kernel kills, hours later",
            fix=fix,
            why=[need.why],
        )
    elif need.gib * GIB > facts.available_bytes:
        notes.warning(
            "ram.available",
            f"cluster: a node needs {need}; "
            f"{facts.available_bytes / GIB:.1f} of {facts.ram_bytes / GIB:.1f} GiB are available "
            "now",
            cost="a worker that the kernel kills, hours later",
            fix="stop other processes on this host",
            why=[need.why],
        )


def disk(case: RunCase, notes: Notes) -> None:
    """Check free space against checkpoints, models and shards."""
    parts = []
    if case.training and case.policy.parameters is not None:
        parts.append(("checkpoints", estimates.disk(case)))
    shards = estimates.shard_bytes(case)
    if shards is not None:
        parts.append(("shards", shards))
    need = max(0.0, sum(e.gib for _, e in parts) - _written(case) / GIB)
    free = case.host.disk_free_bytes / GIB
    if need > free:
        notes.error(
            "disk.run",
            f"{case.root}: the run will write {need:.1f} GiB, and {free:.1f} are "
            "free: " + "; ".join(f"{name} {estimate}" for name, estimate in parts),
            cost="a disk that is full, days into the run",
            fix="free space, choose another --out, or lower keep_checkpoints (or save less often)",
            why=[estimate.why for _, estimate in parts],
        )
    for stage in case.grpo:
        g = case.recipe.grpo(stage)
        saves = -(-g.steps // g.save_every)
        if g.keep_checkpoints is None and saves > 10:
            notes.warning(
                f"{stage}.keep",
                f"train.{stage}.keep_checkpoints=null keeps all of its {saves} checkpoints",
                cost="a disk that fills up",
                fix=f"train.{stage}.keep_checkpoints=2",
            )


def _written(case: RunCase) -> int:
    """Return the bytes that unfinished stages have written, which the estimates count too."""
    folders = [case.root / stage / "checkpoints" for stage in case.training]
    if "data" in case.todo:
        folders.append(case.root / "shards")
    return sum(p.lstat().st_size for f in folders for p in f.rglob("*") if p.is_file())
