"""Estimates of GPU memory, host memory and disk for a run, each with its derivation in words.

Upper bounds from the network's sizes and from how verl 0.9.1 and vLLM keep them, not measurements:
P parameters are trained in fp32 with Adam, sharded over all ranks (FSDP2); the reference stays in
host memory; vLLM frees its share while the policy trains, unless `free_cache_engine` is off. The
sizes of processes were measured on a laptop (docs/results).

Not included: fragmentation, activations of the vision tower (small beside the language model's),
NCCL.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.preflight.checks.case import GIB, RunCase
from rcot_rl.recipe.training_section import GrpoStage

CONTEXT_GIB = 1.5
"""CUDA context and what vLLM keeps while it sleeps, per GPU."""

PROCESS_GIB = {
    "driver, task runner and load balancer": 1.9,
    "an engine and its server": 2.4,
    "a rank": 0.8,
    "an agent worker": 0.7,
    "a reward worker": 0.5,
    "a storage unit": 0.45,
}
"""Proportional set size of each process without weights, in GiB."""

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


@dataclass(frozen=True)
class Estimate:
    """An amount in GiB, and how it is derived."""

    gib: float
    why: str

    @property
    def brief(self) -> str:
        """The amount without its derivation."""
        return f"{self.gib:.2f} GiB"

    def __str__(self) -> str:
        return f"{self.brief}: {self.why}"


def states(case: RunCase, section: GrpoStage) -> tuple[Estimate, Estimate]:
    """Return a rank's trainer states while it trains, and while the engine generates; needs P."""
    p = _parameters(case)
    parts = {"weights": 4, "gradients": 4, "Adam": 8}
    if section.verl_value(f"{_ACTOR}.fsdp_config.offload_policy"):
        none = Estimate(0.0, "all in host memory (offload_policy)")
        return none, none
    if section.lora_rank is not None:
        return _adapter_states(case, section, p)
    away = dict(zip(("weights", "Adam"), offloads(section), strict=True))
    train = Estimate(
        sum(parts.values()) * p / case.ranks / GIB,
        f"({_sum(parts)}) bytes x {p / 1e6:.1f} M parameters / {case.ranks} ranks",
    )
    kept = {name: n for name, n in parts.items() if name != "gradients" and not away[name]}
    rest = Estimate(
        sum(kept.values()) * p / case.ranks / GIB,
        f"({_sum(kept) or '0, all offloaded'}) bytes x {p / 1e6:.1f} M / {case.ranks} ranks",
    )
    return train, rest


def optimizer_step(case: RunCase, section: GrpoStage) -> Estimate:
    """Return what AdamW's step needs beside the states: a copy of the trained parameters."""
    if section.verl_value(f"{_ACTOR}.fsdp_config.offload_policy"):
        return Estimate(0.0, "in host memory (offload_policy)")
    p = adapter_parameters(case, section) if section.lora_rank else _parameters(case)
    why = f"4 bytes x {p / 1e6:.1f} M / {case.ranks} ranks for the step of AdamW"
    return Estimate(4 * p / case.ranks / GIB, why)


def offloads(section: GrpoStage) -> tuple[bool, bool]:
    """Return whether weights, and the optimizer's moments, are offloaded to host memory."""
    config = f"{_ACTOR}.fsdp_config"
    return (
        bool(section.verl_value(f"{config}.param_offload", section.offload == "all")),
        bool(section.verl_value(f"{config}.optimizer_offload", section.offload != "none")),
    )


def adapter_parameters(case: RunCase, section: GrpoStage) -> int:
    """Return the parameters of a LoRA adapter on all linear layers; 0 if none or unknown."""
    shape = case.policy.shape
    if section.lora_rank is None or shape is None:
        return 0
    h, i = shape["hidden_size"], shape["intermediate_size"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = 2 * (h + h) + 2 * (h + kv) + 3 * (h + i)
    return section.lora_rank * layer * shape["num_hidden_layers"]


def _adapter_states(case: RunCase, section: GrpoStage, p: int) -> tuple[Estimate, Estimate]:
    a = adapter_parameters(case, section)
    weights = 0 if offloads(section)[0] else 4
    why = f"x {p / 1e6:.1f} M frozen, and {{}} bytes x {a / 1e6:.1f} M of the adapter, / "
    why += f"{case.ranks} ranks"
    return (
        Estimate((4 * p + 12 * a) / case.ranks / GIB, "4 bytes " + why.format(12)),
        Estimate((weights * p + 8 * a) / case.ranks / GIB, f"{weights} bytes " + why.format(8)),
    )


def activations(case: RunCase, micro_batch: int, length: int) -> Estimate | None:
    """Return a rank's activations in one micro-batch, with gradient checkpointing.

    Returns:
        None if the policy's shape is unknown.
    """
    shape = case.policy.shape
    if shape is None:
        return None
    tokens = micro_batch * length
    h, layers = shape["hidden_size"], shape["num_hidden_layers"]
    logits = 2 * 2 * tokens * shape["vocab_size"]
    inputs = 2 * tokens * layers * h
    layer = 2 * tokens * (8 * h + 4 * shape["intermediate_size"])
    return Estimate(
        (logits + inputs + layer) / GIB,
        f"{tokens} tokens a micro-batch ({micro_batch} x {length}) in bf16: logits and their "
        f"gradient {logits / GIB:.1f}, inputs of {layers} layers {inputs / GIB:.1f}, one layer "
        f"recomputed {layer / GIB:.1f}",
    )


def engine_need(case: RunCase, section: GrpoStage) -> Estimate:
    """Return the least that vLLM needs on a GPU: weights, and the KV cache of one sequence."""
    p, shape = _parameters(case), case.policy.shape
    size = 4 if case.recipe.device == "cpu" else 2
    weights = size * p / section.tensor_parallel_size / GIB
    why = f"weights {size} bytes x {p / 1e6:.1f} M / {section.tensor_parallel_size} = {weights:.2f}"
    cache = 0.0
    if shape is not None:
        longest = section.max_prompt_length + section.max_response_length
        head = shape["hidden_size"] // shape["num_attention_heads"]
        a_token = 2 * size * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head
        cache = a_token * longest / section.tensor_parallel_size / GIB
        why += f", keys and values of {longest} tokens x {a_token} bytes = {cache:.2f}"
    return Estimate(weights + cache, why)


def host_memory(case: RunCase) -> Estimate:
    """Return the host memory of one node at the peak of a GRPO stage."""
    cluster, n = case.recipe.cluster, case.recipe.cluster.gpus_per_node
    number = {
        "driver, task runner and load balancer": 1,
        "an engine and its server": n,
        "a rank": n,
        "an agent worker": cluster.agent_workers,
        "a reward worker": cluster.reward_workers,
        "a storage unit": cluster.queue_storage_units,
    }
    processes = sum(number[name] * gib for name, gib in PROCESS_GIB.items())
    why = [f"processes {processes:.1f} ({sum(number.values())}, sizes as measured)"]
    total = processes
    store, source = object_store(case)
    total += store
    why.append(f"object store {store:.1f} ({source})")
    p = case.policy.parameters
    if p is not None:
        shape = case.policy.shape or {}
        copies = n if shape.get("tie_word_embeddings") else 1
        loading = 4 * p * copies / GIB
        saving = 6 * p / GIB
        standing = 4 * p / case.recipe.cluster.nodes / GIB + _offloaded(case, p)
        total += max(loading, standing + saving)
        why.append(
            f"the larger of loading {loading:.1f} (4 bytes x {p / 1e6:.1f} M x {copies} ranks that "
            f"read it whole) and reference in host memory {standing:.1f} with what rank 0 gathers "
            f"to save {saving:.1f} (4 + 2 bytes x {p / 1e6:.1f} M)"
        )
    return Estimate(total, "; ".join(why))


def object_store(case: RunCase) -> tuple[float, str]:
    """Return the most GiB of Ray's object store on this node, and where the number is from."""
    asked = case.recipe.cluster.object_store_bytes
    if asked is not None:
        return asked / GIB, "cluster.object_store_bytes"
    # Ray's default: 30 % of memory, 200 GB at most; what a run puts there is far less
    return min(0.3 * case.host.ram_bytes, 200e9) / GIB / 3, "a third of Ray's default limit"


def disk(case: RunCase) -> Estimate:
    """Return the size of the checkpoints and models of the stages to be run.

    One more checkpoint is written before an old one is deleted.
    """
    p, recipe = _parameters(case), case.recipe
    parts, total = [], 0.0
    for stage in case.sft:
        # two that verl keeps, the third being written, and the merged model
        sft = (3 + 1) * 4 * p / GIB
        parts.append(f"{stage} {sft:.1f} (4 bytes x {p / 1e6:.1f} M x (2 kept + 1 + merged))")
        total += sft
    for stage in case.grpo:
        g = recipe.grpo(stage)
        saves = -(-g.steps // g.save_every)
        kept = saves if g.keep_checkpoints is None else min(saves, g.keep_checkpoints)
        copies = kept + (0 if g.keep_checkpoints is None else 1)
        trained = p if g.lora_rank is None else adapter_parameters(case, g)
        size = (8 * p + 8 * trained) * copies / GIB
        per_parameter = (
            "(4 weights + 8 Adam + 4 Hugging Face) bytes"
            if trained == p
            else (
                f"(4 weights + 4 Hugging Face) bytes, and 8 x {trained / 1e6:.1f} M of the adapter,"
            )
        )
        parts.append(
            f"{stage} {size:.1f} ({per_parameter} x {p / 1e6:.1f} M x {copies} checkpoints)"
        )
        total += size
    return Estimate(total, " + ".join(parts) or "no checkpoints")


def shard_bytes(case: RunCase) -> Estimate | None:
    """Return the size of shard sets to be built; None if the data stage does not run.

    1.3 bytes a pixel as PNG, 0.25 as JPEG, twice if embedded (rows and media/).
    """
    if "data" not in case.todo:
        return None
    data = case.recipe.data
    side = case.recipe.canvas.image
    rows = sum(s.aks + s.ktg + s.val * (bool(s.aks) + bool(s.ktg)) for s in data.sets.values())
    pixel = (1.3 if data.image_format == "png" else 0.25) * (2 if data.media == "embedded" else 1)
    return Estimate(
        rows * side * side * pixel / GIB, f"{rows} rows x {side}² pixels x {pixel:g} bytes"
    )


def sleeps(section: GrpoStage) -> bool:
    """Return True if vLLM frees its memory while the policy trains."""
    return section.verl_value(f"{_ROLLOUT}.free_cache_engine", True) is not False


def plan(case: RunCase, explain: bool = True) -> dict[str, str]:
    """Return all estimates as lines of the plan; explain: with their derivations."""

    def shown(estimate: Estimate | None) -> str | None:
        if estimate is None or explain:
            return None if estimate is None else str(estimate)
        return estimate.brief

    if case.policy.parameters is None:
        return {"parameters": case.policy.derivation}
    lines: dict[str, str | None] = {
        "parameters": f"{case.policy.parameters / 1e6:.1f} M, from {case.policy.derivation}"
    }
    stage = next(iter((*case.grpo, *case.recipe.grpo_stages)), None)
    if stage is not None:
        section = case.recipe.grpo(stage)
        train, _ = states(case, section)
        lines["trainer, a rank"] = shown(train)
        longest = section.max_prompt_length + section.max_response_length
        active = activations(case, section.micro_batch_size, longest)
        lines["activations, a rank"] = shown(active)
        lines["reference"] = "in host memory (verl offloads it)"
        lines["rollout engine"] = f"{shown(engine_need(case, section))}; at most its share, " + (
            f"{section.gpu_memory_utilization:.2f} of the memory"
        )
        lines["host memory, a node"] = shown(host_memory(case))
    if case.recipe.device == "cuda":
        gpu, source = case.gpu
        lines["GPU"] = f"{gpu:.0f} GiB ({source})"
    lines["checkpoints"] = f"{shown(disk(case))}; {case.host.disk_free_bytes / GIB:.0f} GiB free"
    lines["shards"] = shown(shard_bytes(case))
    return {key: value for key, value in lines.items() if value is not None}


def _parameters(case: RunCase) -> int:
    assert case.policy.parameters is not None, "callers ask for estimates of known policies"
    return case.policy.parameters


def _offloaded(case: RunCase, parameters: int) -> float:
    """Return the GiB of a node's host memory that offloaded trainer states take."""
    most = 0.0
    for stage in case.grpo:
        section = case.recipe.grpo(stage)
        weights, moments = offloads(section)
        bytes_each = 4 * weights + 8 * moments
        if section.verl_value(f"{_ACTOR}.fsdp_config.offload_policy"):
            bytes_each = 16
        most = max(most, bytes_each * parameters / case.recipe.cluster.nodes / GIB)
    return most


def _sum(parts: dict[str, int]) -> str:
    return " + ".join(f"{size} {name}" for name, size in parts.items())
