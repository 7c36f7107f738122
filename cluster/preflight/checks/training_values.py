"""The preflight's checks of training values: batch arithmetic, sampling, limits of vLLM.

Table 7 and section 4.2 of the paper are the defaults. A warning is for values with which GRPO would
learn nothing, or something else than intended.
"""

from __future__ import annotations

from cluster.preflight.checks.case import RunCase
from cluster.preflight.checks.findings import Notes
from cluster.preflight.checks.rewards import tasks_of
from rcot_rl.inference.pool_size import pool_size
from rcot_rl.recipe.schema import TASKS
from rcot_rl.recipe.training_section import GrpoStage, SftStage

MAX_LORA_RANK = 512
"""Largest rank that vLLM supports (vllm/config/lora.py)."""
MANY_EPOCHS = 10
"""GRPO epochs beyond which a warning is due."""

KL_TYPES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
"""Names in `kl_penalty_forward` (verl/trainer/ppo/core_algos.py); each may end in `+`."""
LOSS_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
"""Names in `agg_loss` (verl/trainer/ppo/core_algos.py)."""
_START = "an error when the rollout engine starts, minutes into the stage"


def sft(case: RunCase, notes: Notes) -> None:
    """Check rows, steps and adapter of SFT stages."""
    for stage in case.sft:
        _sft(case, notes, stage, case.recipe.sft(stage))


def _sft(case: RunCase, notes: Notes, stage: str, s: SftStage) -> None:
    key, size = f"train.{stage}", case.recipe.data.sets.get(s.shard_set)
    if size is not None and "data" in case.todo:
        rows = sum(getattr(size, task) for task in s.tasks or TASKS)
        steps = rows // s.batch_size * s.epochs
        if steps == 0:
            notes.error(
                f"{stage}.batch",
                f"{key}.batch_size={s.batch_size}: the {rows} rows of {s.shard_set} make no batch",
                cost="a stage without a step",
                fix=f"lower {key}.batch_size",
            )
        elif s.save_every > steps and steps > 200:
            _never_saved(notes, stage, s.save_every, steps)
    shape = case.policy.shape
    if shape is not None and s.lora_rank > shape["hidden_size"]:
        notes.error(
            f"{stage}.lora",
            f"{key}.lora_rank={s.lora_rank} is more than the policy's width "
            f"{shape['hidden_size']}: the adapter would be larger than the layers it adapts",
            cost="memory, and no low rank",
            fix=f"{key}.lora_rank=8, the paper's",
        )
    if s.lora_alpha > 8 * s.lora_rank:
        notes.warning(
            f"{stage}.lora_alpha",
            f"{key}.lora_alpha={s.lora_alpha} scales the adapter by "
            f"{s.lora_alpha / s.lora_rank:g} (alpha / rank)",
            cost="a diverging SFT stage",
            fix=f"2 x {key}.lora_rank is usual",
        )


def steps(case: RunCase, notes: Notes) -> None:
    """Check steps against rows, checkpoints and learning rate of GRPO stages."""
    for stage in case.grpo:
        g, key = case.recipe.grpo(stage), f"train.{stage}"
        size = case.recipe.data.sets.get(g.shard_set)
        if size is not None and "data" in case.todo:
            tasks = tasks_of(case, stage)
            _rows(notes, stage, g, size.aks + size.ktg, {t: getattr(size, t) for t in tasks})
            if size.val == 0:
                notes.error(
                    f"{stage}.val",
                    f"data.sets.{g.shard_set}.val=0: verl opens a validation file, and there would "
                    "be none",
                    cost="a stage that fails when its turn comes",
                    fix=f"data.sets.{g.shard_set}.val=256",
                )
        if g.save_every > g.steps:
            _never_saved(notes, stage, g.save_every, g.steps)
        parameters = case.policy.parameters or 0
        if parameters > 5e8 and g.learning_rate > 1e-5:
            notes.warning(
                f"{stage}.learning_rate",
                f"{key}.learning_rate={g.learning_rate:g} for "
                f"{parameters / 1e9:.1f} billion parameters; the paper's is 1e-6",
                cost="a policy that collapses within some dozen steps",
                fix=f"{key}.learning_rate=1e-6",
            )


def _never_saved(notes: Notes, stage: str, save_every: int, steps: int) -> None:
    key = f"train.{stage}.save_every"
    notes.warning(
        f"{stage}.saves",
        f"{key}={save_every} is beyond its {steps} steps: a failure restarts the stage from its "
        "first step",
        cost="the whole stage",
        fix=f"lower {key}",
    )


def _rows(notes: Notes, stage: str, g: GrpoStage, rows: int, scored: dict[str, int]) -> None:
    """Check the rows of a set that will be built; scored: task -> rows that the reward scores."""
    key, task, of_task = f"train.{stage}", " or ".join(scored), sum(scored.values())
    if of_task == 0:
        return  # `<stage>.reward_task`
    if of_task < rows:
        notes.error(
            f"{stage}.task",
            f"{key}.shard_set={g.shard_set}: data.sets gives it {of_task} {task} rows of {rows}; "
            f"the reward {g.reward} scores no others",
            cost="an error, or rewards of 0, at every row of the other task",
            fix=f"name a set of only {task} rows in {key}.shard_set, or a reward with routes",
        )
        return
    if rows < g.prompts_per_step:
        notes.error(
            f"{stage}.rows",
            f"{key}.prompts_per_step={g.prompts_per_step}: the {rows} rows of {g.shard_set} make "
            "no step",
            cost="a stage without a step",
            fix=f"lower {key}.prompts_per_step, or build more rows",
        )
        return
    epochs = g.steps * g.prompts_per_step / (rows // g.prompts_per_step * g.prompts_per_step)
    if epochs > MANY_EPOCHS:
        notes.warning(
            f"{stage}.epochs",
            f"{key}.steps={g.steps} x {g.prompts_per_step} prompts show each of the {rows} rows of "
            f"{g.shard_set} {epochs:.0f} times",
            cost="days spent on rows that no longer give a gradient",
            fix=f"lower {key}.steps, or build more rows",
        )


def sampling(case: RunCase, notes: Notes) -> None:
    """Check that the responses of a group can differ: temperature, top_p, top_k."""
    for stage in case.grpo:
        g, key = case.recipe.grpo(stage), f"train.{stage}"
        if g.top_k == 0 or g.top_k < -1:
            notes.error(
                f"{stage}.top_k",
                f"{key}.top_k={g.top_k}: vLLM takes -1 for all tokens, or a number from 1",
                cost=_START,
                fix=f"{key}.top_k=-1",
            )
        elif g.top_k == 1 or g.temperature < 0.3:
            value = f"top_k={g.top_k}" if g.top_k == 1 else f"temperature={g.temperature:g}"
            notes.warning(
                f"{stage}.sampling",
                f"{key}.{value}: the {g.n} responses of a group will hardly differ",
                cost="groups of equal rewards, which give no gradient",
                fix=f"{key}.temperature=1.0 and {key}.top_k=-1, the paper's",
            )
        elif g.temperature > 1.5:
            notes.warning(
                f"{stage}.sampling",
                f"{key}.temperature={g.temperature:g}: most responses will not be sentences",
                cost="rewards of format alone",
                fix=f"{key}.temperature=1.0, the paper's",
            )
        if g.top_p < 1 or g.top_k > 1:
            notes.warning(
                f"{stage}.truncated",
                f"{key}: top_p={g.top_p:g}, top_k={g.top_k} truncate the distribution that "
                "responses are drawn from; log-probabilities are of the full one",
                cost="an update that is silently off-policy",
                fix=f"{key}.top_p=1.0 and {key}.top_k=-1, the paper's",
            )


def objective(case: RunCase, notes: Notes) -> None:
    """Check names and coefficients of the loss (eq. 15)."""
    for stage in case.grpo:
        g, key = case.recipe.grpo(stage), f"train.{stage}"
        for name, value, known in (
            ("kl_loss_type", g.kl_loss_type.removesuffix("+"), KL_TYPES),
            ("loss_agg_mode", g.loss_agg_mode, LOSS_MODES),
        ):
            if value not in known:
                notes.error(
                    f"{stage}.{name}",
                    f"{key}.{name}={getattr(g, name)!r} is none of verl's {', '.join(known)}",
                    cost="an error at the first update, after the rollouts",
                    fix=f"{key}.{name}={'low_var_kl' if name == 'kl_loss_type' else 'token-mean'}",
                )
        if g.kl_loss_coef == 0:
            notes.warning(
                f"{stage}.kl",
                f"{key}.kl_loss_coef=0, and use_kl_loss is on: the reference is kept and computed "
                "for nothing",
                cost="its memory, and a quarter of each step",
                fix=f"{key}.kl_loss_coef=0.01, the paper's, or switch use_kl_loss off in "
                f"{key}.verl",
            )
        elif g.kl_loss_coef > 0.5:
            notes.warning(
                f"{stage}.kl",
                f"{key}.kl_loss_coef={g.kl_loss_coef:g} holds the policy to its start",
                cost="a stage that changes nothing",
                fix=f"{key}.kl_loss_coef=0.01",
            )
        if g.clip_ratio >= 1:
            notes.warning(
                f"{stage}.clip",
                f"{key}.clip_ratio={g.clip_ratio:g} clips nothing from below",
                cost="steps of any size",
                fix=f"{key}.clip_ratio=0.2",
            )


def engine(case: RunCase, notes: Notes) -> None:
    """Check for values that vLLM refuses, in rollouts and in predictions."""
    for stage in case.grpo:
        g, key = case.recipe.grpo(stage), f"train.{stage}"
        _tensor_parallel(case, notes, stage, key, g.tensor_parallel_size, case.ranks)
        _batched(notes, stage, key, g.max_num_batched_tokens, g.max_num_seqs)
        if g.max_num_batched_tokens < g.max_prompt_length:
            notes.warning(
                f"{stage}.batched_tokens",
                f"{key}.max_num_batched_tokens={g.max_num_batched_tokens} is less than a prompt's "
                f"{g.max_prompt_length} tokens: vLLM prefills prompts in chunks",
                cost="slower rollouts; on a CPU, errors for seeds",
                fix=f"{key}.max_num_batched_tokens={max(8192, g.max_prompt_length)}",
            )
        rank = g.verl_value("actor_rollout_ref.model.lora_rank", g.lora_rank)
        if isinstance(rank, int) and rank > MAX_LORA_RANK:
            notes.error(
                f"{stage}.lora",
                f"{key}: lora_rank={rank} is more than vLLM's largest max_lora_rank, "
                f"{MAX_LORA_RANK}",
                cost=_START,
                fix="lower the rank",
            )
    if "predict" in case.todo:
        e = case.recipe.engine
        gpus = case.recipe.cluster.gpus_per_node
        _tensor_parallel(case, notes, "predict", "engine", e.tensor_parallel_size, gpus)
        _pool(case, notes, case.recipe.cluster.nodes * gpus)
        _batched(notes, "predict", "engine", e.max_num_batched_tokens, e.max_num_seqs)


def _pool(case: RunCase, notes: Notes, gpus: int) -> None:
    size = pool_size(case.recipe)
    if size.gpus > gpus + 1e-9:
        notes.error(
            "predict.pool",
            f"predict.engines={size.engines} x {size.engine_gpus:g} GPUs and "
            f"predict.segmenters={size.segmenters} x {size.segmenter_gpus:g} are "
            f"{size.gpus:g} GPUs, and the cluster has {gpus}",
            cost="a stage that waits for GPUs without end",
            fix="lower them, or leave both null",
        )


def _tensor_parallel(
    case: RunCase, notes: Notes, stage: str, key: str, size: int, devices: int
) -> None:
    heads = (case.policy.shape or {}).get("num_attention_heads")
    per_node = case.recipe.cluster.gpus_per_node
    fault = None
    if heads is not None and heads % size:
        fault = f"does not divide the policy's {heads} attention heads"
    elif devices % size or size > per_node:
        fault = f"does not divide the {devices} ranks ({per_node} a node)"
    if fault:
        notes.error(
            f"{stage}.tensor_parallel",
            f"{key}.tensor_parallel_size={size} {fault}",
            cost=_START,
            fix=f"{key}.tensor_parallel_size=1",
        )


def _batched(notes: Notes, stage: str, key: str, tokens: int, seqs: int) -> None:
    if tokens < seqs:
        notes.error(
            f"{stage}.max_num_seqs",
            f"{key}.max_num_batched_tokens={tokens} is less than max_num_seqs={seqs}: vLLM refuses "
            "it",
            cost=_START,
            fix=f"{key}.max_num_seqs={tokens}",
        )
