"""The preflight's checks of the training sections: arithmetic of batches, sampling, vLLM's limits.

Table 7 and section 4.2 of the paper are the defaults; a check warns where a value would make GRPO
learn nothing, or other than it seems.
"""

from __future__ import annotations

from cluster.preflight.checks.case import Case
from cluster.preflight.checks.findings import Notes
from cluster.preflight.checks.rewards import tasks_of
from rcot_rl.recipe.schema import section_key
from rcot_rl.recipe.training import GrpoSection

MAX_LORA_RANK = 512
"""vLLM's largest (vllm/config/lora.py)."""
MANY_EPOCHS = 10
KL_TYPES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
"""verl/trainer/ppo/core_algos.py, `kl_penalty_forward`; each also with a `+`."""
LOSS_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm",
              "seq-mean-token-mean")  # fmt: skip
"""verl/trainer/ppo/core_algos.py, `agg_loss`."""
_START = "an error when the rollout engine starts, minutes into the stage"


def sft(case: Case, notes: Notes) -> None:
    """CoT-SFT's rows, steps and adapter."""
    if "sft" not in case.todo:
        return
    s, size = case.recipe.sft, case.recipe.data.sets.get(case.recipe.sft.shard_set)
    if size is not None and "data" in case.todo:
        rows = size.aks + size.ktg
        steps = rows // s.batch_size * s.epochs
        if steps == 0:
            notes.error(
                "sft.batch", f"sft.batch_size={s.batch_size}: the {rows} rows of {s.shard_set} "
                "make no batch", cost="a stage without a step", fix="lower sft.batch_size",
            )  # fmt: skip
        elif s.save_every > steps and steps > 200:
            notes.warning(
                "sft.saves", f"sft.save_every={s.save_every} is beyond its {steps} steps: a "
                "failure starts it over", cost="the whole stage", fix="lower sft.save_every",
            )  # fmt: skip
    shape = case.policy.shape
    if shape is not None and s.lora_rank > shape["hidden_size"]:
        notes.error(
            "sft.lora", f"sft.lora_rank={s.lora_rank} is more than the policy's width "
            f"{shape['hidden_size']}: the adapter would be larger than the layers it adapts",
            cost="memory, and no low rank", fix="sft.lora_rank=8, the paper's",
        )  # fmt: skip
    if s.lora_alpha > 8 * s.lora_rank:
        notes.warning(
            "sft.lora_alpha", f"sft.lora_alpha={s.lora_alpha} scales the adapter by "
            f"{s.lora_alpha / s.lora_rank:g} (alpha / rank)", cost="a diverging SFT stage",
            fix="2 x sft.lora_rank is usual",
        )  # fmt: skip


def steps(case: Case, notes: Notes) -> None:
    """GRPO's steps against the rows there will be, checkpoints, learning rate."""
    for stage in case.grpo:
        g, key = case.recipe.grpo(stage), section_key(stage)
        size = case.recipe.data.sets.get(g.shard_set)
        if size is not None and "data" in case.todo:
            tasks = tasks_of(case, stage)
            _rows(notes, stage, g, size.aks + size.ktg, {t: getattr(size, t) for t in tasks})
            if size.val == 0:
                notes.error(
                    f"{stage}.val", f"data.sets.{g.shard_set}.val=0: verl opens a validation file, "
                    "and there would be none", cost="a stage that fails when its turn comes",
                    fix=f"data.sets.{g.shard_set}.val=256",
                )  # fmt: skip
        if g.save_every > g.steps:
            notes.warning(
                f"{stage}.saves", f"{key}.save_every={g.save_every} is beyond its {g.steps} steps: "
                "a failure starts it anew", cost="the whole stage", fix=f"lower {key}.save_every",
            )  # fmt: skip
        large = (case.policy.parameters or 0) > 5e8
        if large and g.learning_rate > 1e-5:
            notes.warning(
                f"{stage}.learning_rate", f"{key}.learning_rate={g.learning_rate:g} for "
                f"{case.policy.parameters / 1e9:.1f} billion parameters; the paper's is 1e-6",
                cost="a policy that collapses within some dozen steps",
                fix=f"{key}.learning_rate=1e-6",
            )  # fmt: skip


def _rows(notes: Notes, stage: str, g: GrpoSection, rows: int, scored: dict[str, int]) -> None:
    key, task, of_task = section_key(stage), " or ".join(sorted(scored)), sum(scored.values())
    if of_task < rows:
        notes.error(
            f"{stage}.task", f"{key}.shard_set={g.shard_set}: data.sets gives it {of_task} "
            f"{task} rows of {rows}; the reward {g.reward} scores no others",
            cost="an error, or rewards of 0, at every row of the other task",
            fix=f"name a set of {task} rows alone in {key}.shard_set, or a reward with routes",
        )  # fmt: skip
        return
    if rows < g.prompts_per_step:
        notes.error(
            f"{stage}.rows", f"{key}.prompts_per_step={g.prompts_per_step}: the {rows} rows of "
            f"{g.shard_set} make no step", cost="a stage without a step",
            fix=f"lower {key}.prompts_per_step, or build more rows",
        )  # fmt: skip
        return
    epochs = g.steps * g.prompts_per_step / (rows // g.prompts_per_step * g.prompts_per_step)
    if epochs > MANY_EPOCHS:
        notes.warning(
            f"{stage}.epochs", f"{key}.steps={g.steps} x {g.prompts_per_step} prompts show each of "
            f"the {rows} rows of {g.shard_set} {epochs:.0f} times",
            cost="days spent on rows that give no gradient any more",
            fix=f"lower {key}.steps, or build more rows",
        )  # fmt: skip


def sampling(case: Case, notes: Notes) -> None:
    """Temperature, top_p, top_k: what a group's responses can differ in."""
    for stage in case.grpo:
        g, key = case.recipe.grpo(stage), section_key(stage)
        if g.top_k == 0 or g.top_k < -1:
            notes.error(
                f"{stage}.top_k", f"{key}.top_k={g.top_k}: verl passes it to vLLM, where -1 means "
                "all tokens and numbers from 1 that many", cost=_START, fix=f"{key}.top_k=-1",
            )  # fmt: skip
        elif g.top_k == 1 or g.temperature < 0.3:
            what = f"top_k={g.top_k}" if g.top_k == 1 else f"temperature={g.temperature:g}"
            notes.warning(
                f"{stage}.sampling", f"{key}.{what}: the {g.n} responses of a group will hardly "
                "differ", cost="groups of equal rewards, which give no gradient",
                fix=f"{key}.temperature=1.0 and {key}.top_k=-1, the paper's",
            )  # fmt: skip
        elif g.temperature > 1.5:
            notes.warning(
                f"{stage}.sampling", f"{key}.temperature={g.temperature:g}: most responses will be "
                "no sentences", cost="rewards of format alone",
                fix=f"{key}.temperature=1.0, the paper's",
            )  # fmt: skip
        if g.top_p < 1 or g.top_k > 1:
            notes.warning(
                f"{stage}.truncated", f"{key}: top_p={g.top_p:g}, top_k={g.top_k} cut off the "
                "distribution that responses are drawn from, and log-probabilities are of the "
                "whole one", cost="an update that is off-policy without saying so",
                fix=f"{key}.top_p=1.0 and {key}.top_k=-1, the paper's",
            )  # fmt: skip


def objective(case: Case, notes: Notes) -> None:
    """Names and coefficients of the loss (eq. 15)."""
    for stage in case.grpo:
        g, key = case.recipe.grpo(stage), section_key(stage)
        for name, value, known in (
            ("kl_loss_type", g.kl_loss_type.removesuffix("+"), KL_TYPES),
            ("loss_agg_mode", g.loss_agg_mode, LOSS_MODES),
        ):
            if value not in known:
                notes.error(
                    f"{stage}.{name}", f"{key}.{name}={getattr(g, name)!r} is none of verl's "
                    f"{', '.join(known)}", cost="an error at the first update, after the rollouts",
                    fix=f"{key}.{name}={'low_var_kl' if name == 'kl_loss_type' else 'token-mean'}",
                )  # fmt: skip
        if g.kl_loss_coef == 0:
            notes.warning(
                f"{stage}.kl", f"{key}.kl_loss_coef=0, and use_kl_loss is on: the reference is "
                "kept and computed for nothing", cost="its memory, and a quarter of each step",
                fix=f"{key}.kl_loss_coef=0.01, the paper's, or switch use_kl_loss off in "
                f"{key}.verl",
            )  # fmt: skip
        elif g.kl_loss_coef > 0.5:
            notes.warning(
                f"{stage}.kl", f"{key}.kl_loss_coef={g.kl_loss_coef:g} holds the policy to its "
                "start", cost="a stage that changes nothing", fix=f"{key}.kl_loss_coef=0.01",
            )  # fmt: skip
        if g.clip_ratio >= 1:
            notes.warning(
                f"{stage}.clip", f"{key}.clip_ratio={g.clip_ratio:g} clips nothing from below",
                cost="steps of any size", fix=f"{key}.clip_ratio=0.2",
            )  # fmt: skip


def engine(case: Case, notes: Notes) -> None:
    """What vLLM refuses, in rollouts and in predictions."""
    for stage in case.grpo:
        g, key = case.recipe.grpo(stage), section_key(stage)
        _tensor_parallel(case, notes, stage, key, g.tensor_parallel_size, case.ranks)
        _batched(case, notes, stage, key, g.max_num_batched_tokens, g.max_num_seqs)
        if g.max_num_batched_tokens < g.max_prompt_length:
            notes.warning(
                f"{stage}.batched_tokens", f"{key}.max_num_batched_tokens="
                f"{g.max_num_batched_tokens} is less than a prompt's {g.max_prompt_length} tokens: "
                "vLLM reads prompts in pieces", cost="slower rollouts; on a CPU, errors for seeds",
                fix=f"{key}.max_num_batched_tokens={max(8192, g.max_prompt_length)}",
            )  # fmt: skip
        rank = g.verl_value("actor_rollout_ref.model.lora_rank", g.lora_rank)
        if isinstance(rank, int) and rank > MAX_LORA_RANK:
            notes.error(
                f"{stage}.lora", f"{key}: lora_rank={rank} is more than vLLM's largest "
                f"max_lora_rank, {MAX_LORA_RANK}", cost=_START, fix="lower the rank",
            )  # fmt: skip
    if "predict" in case.todo:
        e = case.recipe.engine
        gpus = case.recipe.cluster.gpus_per_node
        _tensor_parallel(case, notes, "predict", "engine", e.tensor_parallel_size, gpus)
        _batched(case, notes, "predict", "engine", e.max_num_batched_tokens, e.max_num_seqs)


def _tensor_parallel(
    case: Case, notes: Notes, stage: str, key: str, size: int, devices: int
) -> None:
    heads = (case.policy.shape or {}).get("num_attention_heads")
    per_node = case.recipe.cluster.gpus_per_node
    says = None
    if heads is not None and heads % size:
        says = f"does not divide the policy's {heads} attention heads"
    elif devices % size or size > per_node:
        says = f"does not divide the {devices} ranks ({per_node} a node)"
    if says:
        notes.error(
            f"{stage}.tensor_parallel", f"{key}.tensor_parallel_size={size} {says}", cost=_START,
            fix=f"{key}.tensor_parallel_size=1",
        )  # fmt: skip


def _batched(case: Case, notes: Notes, stage: str, key: str, tokens: int, seqs: int) -> None:
    if tokens < seqs:
        notes.error(
            f"{stage}.max_num_seqs", f"{key}.max_num_batched_tokens={tokens} is less than "
            f"max_num_seqs={seqs}: vLLM refuses it", cost=_START,
            fix=f"{key}.max_num_seqs={tokens}",
        )  # fmt: skip
