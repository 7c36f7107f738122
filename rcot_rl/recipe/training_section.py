"""Recipe sections of training: SFT and GRPO stages, and their cluster (Table 7, section 4.2).

`train:` is an ordered mapping from a stage's name to an `SftStage` or a `GrpoStage`. No code
depends on a stage's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rcot_rl.recipe.base import Section
from rcot_rl.system.paths import HandedOnPath

BASE = "base"
"""In `after`, `reference` and `eval.checkpoints`: the recipe's base policy."""


class SftStage(Section):
    """An SFT stage: LoRA on the language model with a frozen vision tower, merged at the end."""

    kind: Literal["sft"]
    """Supervised fine-tuning."""

    after: str | None = None
    """Stage whose model this stage starts from, or `base`. None: the previous stage in `train`."""

    shard_set: str = "sft-28k"
    """Name of the shard set to train on; a key of `data.sets`."""

    tasks: list[Literal["aks", "ktg"]] | None = Field(default=None, min_length=1)
    """Train only on the rows of these tasks (Table 5). None: on all rows of the set."""

    lora_rank: int = Field(default=8, ge=1)
    """Rank of the adapter."""

    lora_alpha: int = Field(default=16, ge=1)
    """Scaling of the adapter. The paper does not give it; 2 x rank is LLaMA-Factory's default."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""

    scheduler: Literal["cosine", "constant"] = "cosine"
    """Learning rate schedule after the warm-up."""

    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps for a linear warm-up."""

    batch_size: int = Field(default=64, ge=1)
    """Sequences per optimizer step, over all ranks: the paper's batch of 8 x 8 accumulation
    steps."""

    micro_batch_size: int = Field(default=8, ge=1)
    """Sequences per forward pass on one device."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the shard set."""

    max_length: int = Field(default=4024, ge=1)
    """Maximum number of tokens of prompt and response: 3000 + 1024."""

    save_every: int = Field(default=100, ge=1)
    """Steps between checkpoints. The last step always saves one."""

    verl: dict[str, Any] = Field(default_factory=dict)
    """Keys that override verl's SFT configuration, dotted or nested."""


class GrpoStage(Section):
    """A GRPO stage on verl. The top-level section `grpo` has defaults for all GRPO stages."""

    kind: Literal["grpo"]
    """Group relative policy optimization."""

    after: str | None = None
    """Stage whose policy this stage starts from, or `base`. None: the previous stage in `train`."""

    reference: str | None = None
    """Stage whose model is the KL reference (eq. 15), or `base`. None: the last SFT stage that this
    stage descends from, or else the base policy. The reference can differ from the start only if
    the stage starts from a GRPO stage."""

    shard_set: str
    """Name of the shard set to train on; a key of `data.sets`."""

    reward: HandedOnPath
    """Name or path of a reward recipe, FILE.py:FUNCTION, or pkg://module."""

    rehearse: str | None = None
    """Earlier GRPO stage whose rows are mixed into this stage's, scored with that stage's reward,
    so that the policy does not forget them. None: only the rows of `shard_set`."""

    reward_deadline_s: float = Field(default=10.0, gt=0)
    """Maximum seconds to score one response; beyond it, the reward is 0 (reason `deadline`)."""

    steps: int = Field(ge=1)
    """Number of optimizer steps."""

    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts per step, over all ranks."""

    n: int = Field(default=8, ge=2)
    """Group size: responses per prompt."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Constant learning rate of AdamW."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of AdamW."""

    kl_loss_coef: float = Field(default=0.01, ge=0)
    """Weight of the KL loss (β in eq. 15)."""

    kl_loss_type: str = "low_var_kl"
    """KL estimator, by verl's name: `kl`, `abs`, `mse` or `low_var_kl` (k3)."""

    clip_ratio: float = Field(default=0.2, gt=0)
    """Clipping range of the probability ratio (ε in eq. 15)."""

    loss_agg_mode: str = "token-mean"
    """Aggregation of the token losses, by verl's name. Eq. 15 of the paper shows no mean over
    tokens, but the code that it builds on uses one."""

    advantage: Literal["group", "group-mean", "task"] = "group"
    """Normalization of the advantage, a response's reward minus its group's mean. `group`: divided
    by the group's standard deviation (eq. 14; unbiased, + 1e-6). `group-mean`: not divided. `task`:
    divided by the standard deviation over all responses of the same task in the step."""

    old_log_probs: Literal["reuse", "recompute"] = "reuse"
    """Source of the old log-probabilities in eq. 15. `reuse`: the forward pass of the update, which
    is exact because each batch gets one update. `recompute`: a separate forward pass before the
    update, as in verl, which also logs `training/rollout_probs_diff_max`."""

    dynamic_sampling: bool = False
    """Replace groups with equal rewards by groups of further prompts (DAPO's filter)."""

    agent: Literal["single-turn", "agentic-aks"] = "single-turn"
    """`single-turn`: one response per prompt. `agentic-aks`: a response is an episode of at most
    `predict.rounds` judgements; after B, the policy selects a new frame of its row's clip (needs
    `data.clip_frames` and `data.clip_tasks: [aks]`)."""

    rollouts: Literal["sync", "colocate-async"] = "sync"
    """`sync`: a step waits for all its rollouts. `colocate-async`: rollouts of the next step start
    before this step's update and continue after it, on the same devices, so that a step does not
    wait for the longest response."""

    lora_rank: int | None = Field(default=None, ge=1)
    """Rank of an adapter on the language model. None: train all weights, as in the paper."""

    lora_alpha: int = Field(default=16, ge=1)
    """Scaling of the adapter."""

    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of rollouts."""

    top_k: int = -1
    """Top-k sampling of rollouts; -1 disables it."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling of rollouts."""

    max_prompt_length: int = Field(default=3000, ge=1)
    """Maximum number of tokens of a prompt."""

    max_response_length: int = Field(default=2000, ge=1)
    """Maximum number of tokens of a response."""

    micro_batch_size: int = Field(default=4, ge=1)
    """Sequences per forward pass on one device."""

    packing: bool = False
    """Pack the sequences of a micro-batch in one row, without padding and with each prompt once, so
    that most layers compute a group's prompt once. Needs Qwen2.5-VL and `models.attention: sdpa`.
    Groups should not be split over micro-batches: `micro_batch_size` a multiple of `n`."""

    offload: Literal["none", "optimizer", "all"] = "none"
    """What is offloaded to host memory while unused: `optimizer`: the optimizer state; `all`: also
    the weights of policy and reference."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs per rollout engine."""

    gpu_memory_utilization: float = Field(default=0.5, gt=0, le=1)
    """Share of a GPU's memory for the rollout engine."""

    max_num_batched_tokens: int = Field(default=8192, ge=1)
    """Maximum number of tokens per iteration of a rollout engine."""

    max_num_seqs: int = Field(default=256, ge=1)
    """Maximum number of sequences per iteration of a rollout engine."""

    save_every: int = Field(default=50, ge=1)
    """Steps between checkpoints. The last step always saves one."""

    final_outputs: bool = False
    """Let the rollout engine return a response once, as token ids: no text, and no output per
    token. Responses are equal. With `rollouts: colocate-async` there are outputs per token, since
    verl waits for the first one before it interrupts a response."""

    rollout_threads: int | None = Field(default=None, ge=1)
    """Threads of a rollout engine on a CPU. None: all cores of its rank. A tiny model is faster
    with one: its layers are too small to share, and agent loop and rewards need the other cores."""

    max_lost_share: float = Field(default=0.25, ge=0, le=1)
    """Maximum share of a step's responses that may fail in the agent loop; beyond it, the stage
    fails. verl alone would train on the remaining responses."""

    keep_checkpoints: int | None = Field(default=2, ge=1)
    """Number of newest checkpoints to keep. None: all."""

    dump_rollouts: bool = True
    """Write every response with its reward, components and reasons to rollouts/STEP.jsonl."""

    verl: dict[str, Any] = Field(default_factory=dict)
    """Keys that override verl's configuration, dotted or nested."""

    def verl_value(self, key: str, otherwise: Any = None) -> Any:
        """Return the value of a dotted key of verl under `verl`, or `otherwise` if it is not
        set."""
        return _looked_up(self.verl, key, otherwise)


TrainStage = Annotated[SftStage | GrpoStage, Field(discriminator="kind")]


def _looked_up(values: Any, key: str, otherwise: Any) -> Any:
    if not isinstance(values, Mapping):
        return otherwise
    if key in values:
        return values[key]
    for name, below in values.items():
        if key.startswith(f"{name}."):
            return _looked_up(below, key[len(name) + 1 :], otherwise)
    return otherwise


_RESERVED_PORTS = frozenset({6379, 8265, *range(10001, 32000)})
"""Ray's head, dashboard, client and workers, and the ports of `cluster.launch.rendezvous`."""


class ClusterSection(Section):
    """The nodes, GPUs and Ray workers of a training stage."""

    nodes: int = Field(default=1, ge=1)
    """Number of nodes for GRPO. SFT (an adapter, one epoch) trains on the first node only."""

    gpus_per_node: int = Field(default=4, ge=1)
    """Trainer ranks per node; processes on a CPU."""

    ray_address: str = "local"
    """Address of a running Ray cluster. `local`: the run starts its own Ray and stops it."""

    agent_workers: int = Field(default=8, ge=1)
    """Number of agent loop workers, which request the rollouts."""

    reward_workers: int = Field(default=8, ge=1)
    """Number of workers that compute rewards."""

    queue_storage_units: int = Field(default=8, ge=1)
    """Number of storage actors of TransferQueue."""

    object_store_bytes: int | None = Field(default=None, ge=80 * 2**20)
    """Size of Ray's object store, for `ray_address: local`. None: Ray's default."""

    metrics_port: int | None = Field(default=None, ge=1024, le=65535)
    """Port of Ray's Prometheus endpoint on every node that the run or its launcher starts. With it,
    the rollout engines of training serve statistics too, and RUN/tracking/prometheus lists all
    addresses (docs/system-metrics.md). None: no statistics of engines, and a port of Ray's choice.
    """

    stall_timeout_s: int = Field(default=1800, ge=30)
    """Seconds without output in a stage's log after which the stage is ended as hung."""

    @field_validator("metrics_port")
    @classmethod
    def _outside_other_ranges(cls, port: int | None) -> int | None:
        if port in _RESERVED_PORTS:
            raise ValueError(
                "is used by Ray or the launchers (6379, 8265, 10001 to 31999); choose another, "
                "such as 8090"
            )
        return port
