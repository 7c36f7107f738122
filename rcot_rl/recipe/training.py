"""Recipe sections of training: CoT-SFT, GRPO, the cluster they run on (Table 7, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from rcot_rl.paths import HandedOnPath
from rcot_rl.recipe.base import Section


class SftSection(Section):
    """CoT-SFT: LoRA on the language model, vision tower frozen, merged at the end."""

    shard_set: str = "sft-28k"
    lora_rank: int = Field(default=8, ge=1)
    lora_alpha: int = Field(default=16, ge=1)
    """The paper is silent; 2 r, LLaMA-Factory's default."""

    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    scheduler: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    batch_size: int = Field(default=64, ge=1)
    """Sequences an optimizer step: the paper's batch 8 x accumulation 8."""

    micro_batch_size: int = Field(default=8, ge=1)
    """Sequences a forward pass on one device."""

    epochs: int = Field(default=1, ge=1)
    max_length: int = Field(default=4024, ge=1)
    """Tokens of prompt and response together: 3000 + 1024."""

    save_every: int = Field(default=100, ge=1)
    """Steps between checkpoints; the last step always makes one."""

    verl: dict[str, Any] = Field(default_factory=dict)
    """Further keys of verl's SFT configuration, dotted or nested."""


class GrpoSection(Section):
    """One GRPO stage on verl."""

    shard_set: str
    reward: HandedOnPath
    """A reward recipe's name or path, or FILE.py:FUNCTION."""

    reward_deadline_s: float = Field(default=10.0, gt=0)
    """Seconds that the reward of one response may take; beyond, it is 0 (reason `deadline`)."""

    steps: int = Field(ge=1)
    prompts_per_step: int = Field(default=16, ge=1)
    n: int = Field(default=8, ge=2)
    """Responses a prompt: the group."""

    learning_rate: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    kl_loss_coef: float = Field(default=0.01, ge=0)
    kl_loss_type: str = "low_var_kl"
    clip_ratio: float = Field(default=0.2, gt=0)
    loss_agg_mode: str = "token-mean"
    """The paper's eq. 15 shows no token mean; its code lineage uses one. verl's names."""

    advantage: Literal["group", "group-mean", "task"] = "group"
    """A response's reward less its group's mean, over: the group's standard deviation (eq. 14;
    unbiased, + 1e-6), nothing, or the spread of all its task's responses in this step."""

    old_log_probs: Literal["reuse", "recompute"] = "reuse"
    """Where eq. 15's old log-probabilities come from. `reuse`: the update's own forward pass, which
    is exact because each batch gets one update. `recompute`: a pass of its own before the update,
    as verl does it, which also logs `training/rollout_probs_diff_max`."""

    dynamic_sampling: bool = False
    """Sample further prompts in place of groups whose rewards are all equal (DAPO's filter)."""

    agent: Literal["single-turn", "agentic-aks"] = "single-turn"
    """agentic-aks: a response is an episode of `predict.rounds` judgements at most; on B the policy
    selects again among the frames of its row's clip (`data.clip_frames`, `clip_tasks: [aks]`)."""

    rollouts: Literal["sync", "colocate-async"] = "sync"
    """colocate-async: the next step's rollouts start before this step's update and go on after it,
    on the same devices; the step no longer waits for the longest response."""

    lora_rank: int | None = Field(default=None, ge=1)
    """Train an adapter on the language model. None: all weights, as the paper."""

    lora_alpha: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_k: int = -1
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_prompt_length: int = Field(default=3000, ge=1)
    max_response_length: int = Field(default=2000, ge=1)
    micro_batch_size: int = Field(default=4, ge=1)
    """Sequences a forward pass on one device."""

    offload: Literal["none", "optimizer", "all"] = "none"
    """What lies in host memory while it is not used: the optimizer's moments, or also weights."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    gpu_memory_utilization: float = Field(default=0.5, gt=0, le=1)
    max_num_batched_tokens: int = Field(default=8192, ge=1)
    max_num_seqs: int = Field(default=256, ge=1)
    save_every: int = Field(default=50, ge=1)
    """Steps between checkpoints; the last step always makes one."""

    max_lost_share: float = Field(default=0.25, ge=0, le=1)
    """Share of a step's responses that may fail in the agent loop; beyond it the stage fails. verl
    itself goes on with whatever is left."""

    keep_checkpoints: int | None = Field(default=2, ge=1)
    dump_rollouts: bool = True
    """Write rollouts/STEP.jsonl: every response with its reward, components and reasons."""

    verl: dict[str, Any] = Field(default_factory=dict)
    """Further keys of verl's configuration, dotted or nested."""

    def verl_value(self, key: str, otherwise: Any = None) -> Any:
        """What `verl` says of a dotted key."""
        return _looked_up(self.verl, key, otherwise)


def _looked_up(values: Any, key: str, otherwise: Any) -> Any:
    if not isinstance(values, Mapping):
        return otherwise
    if key in values:
        return values[key]
    for name, below in values.items():
        if key.startswith(f"{name}."):
            return _looked_up(below, key[len(name) + 1 :], otherwise)
    return otherwise


class ClusterSection(Section):
    """Where a training stage runs."""

    nodes: int = Field(default=1, ge=1)
    """Nodes for GRPO. CoT-SFT (an adapter, one epoch) trains on the first node only."""

    gpus_per_node: int = Field(default=4, ge=1)
    """Trainer ranks a node; on a CPU, processes."""

    ray_address: str = "local"
    """`local` starts a Ray of its own and stops it; else the address of a running one."""

    agent_workers: int = Field(default=8, ge=1)
    reward_workers: int = Field(default=8, ge=1)
    queue_storage_units: int = Field(default=8, ge=1)
    """TransferQueue's storage actors."""

    object_store_bytes: int | None = Field(default=None, ge=80 * 2**20)
    stall_timeout_s: int = Field(default=1800, ge=30)
    """A training stage that writes nothing to its log for so long is ended as hung."""
