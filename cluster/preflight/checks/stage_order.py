"""The preflight's checks of the order of stages: each finds the results that it starts from."""

from __future__ import annotations

from cluster.preflight.checks.case import RunCase
from cluster.preflight.checks.findings import Notes
from cluster.preflight.checks.rewards import rows_of
from rcot_rl.recipe.data_section import has_traces
from rcot_rl.recipe.training_section import BASE
from rcot_rl.suggestions import did_you_mean, nearest

_LATER = "a stage that fails when its turn comes, days later"


def order(case: RunCase, notes: Notes) -> None:
    """Check that `stages` make what each stage starts from, or that it is in this folder."""
    recipe = case.recipe
    for stage in case.todo:
        for before, role in _needs(case, stage).items():
            if before == BASE or before in case.chosen or case.is_done(before):
                continue
            fix = f"add {before} to stages, or give --out the folder in which it is done"
            if stage in recipe.train and not case.is_begun(stage):
                fix += f", or name another stage or {BASE} in train.{stage}.{role}"
            notes.error(
                "stages.order",
                f"stages: {stage} needs the result of {before}, which is neither among them nor "
                f"done in {case.root}",
                cost=_LATER,
                fix=fix,
            )
    for stage in case.grpo:
        _adapter(case, notes, stage)
    twice = next((s for s in recipe.stages if recipe.stages.count(s) > 1), None)
    if twice is not None:
        notes.warning(
            "stages.twice",
            f"stages: {twice} is named twice, and runs once",
            cost="a surprise",
            fix="name it once",
        )


def _needs(case: RunCase, stage: str) -> dict[str, str]:
    """Return the stages that must be done before `stage`, each with the key that names it."""
    recipe = case.recipe
    if stage == "eval":
        return {"predict": ""}
    if stage not in recipe.train:
        return {}
    needs = {recipe.reference_of(stage): "reference"}
    if stage in recipe.sft_stages or not case.is_begun(stage):
        needs[recipe.start_of(stage)] = "after"  # a checkpoint has the policy, not the reference
    return needs


def _adapter(case: RunCase, notes: Notes, stage: str) -> None:
    """Check that a stage that starts from a GRPO stage can load its weights, or its adapter."""
    recipe, start = case.recipe, case.recipe.start_of(stage)
    if start not in recipe.grpo_stages or case.is_begun(stage):
        return
    key = "actor_rollout_ref.model.lora_rank"
    settings = recipe.grpo(stage), recipe.grpo(start)
    rank, before = (g.verl_value(key, g.lora_rank) for g in settings)
    reference, its_reference = recipe.reference_of(stage), recipe.reference_of(start)
    if rank != before:
        ranks = ["null" if r is None else str(r) for r in (rank, before)]
        notes.error(
            f"{stage}.adapter",
            f"train.{stage}.lora_rank is {ranks[0]}, train.{start}.lora_rank {ranks[1]}: the "
            f"weights of {start} do not fit the model of {stage}",
            cost=f"all of {start}, before {stage} fails to load",
            fix=f"train.{stage}.lora_rank={ranks[1]}",
        )
    elif rank is not None and reference != its_reference:
        notes.error(
            f"{stage}.adapter",
            f"train.{stage}.reference is {reference}, that of {start} {its_reference}: the adapter "
            f"of {start} belongs to the model of {its_reference}",
            cost="a policy of an adapter on another model, without an error",
            fix=f"train.{stage}.reference={its_reference}",
        )


def sets(case: RunCase, notes: Notes) -> None:
    """Check that the shard sets that stages train on are among those that the data stage builds."""
    if "data" not in case.todo:
        return  # `built_shards` checks the existing ones
    recipe, known = case.recipe, case.recipe.data.sets
    taught = {settings.shard_set for settings in recipe.sft_stages.values()}
    for stage in case.training:
        key, name = f"train.{stage}.shard_set", recipe.stage(stage).shard_set
        if name not in known:
            near = nearest(name, known)
            sets = ", ".join(known)
            notes.error(
                f"{stage}.shard_set",
                f"{key}={name} is none of data.sets{did_you_mean(name, known)}",
                cost=_LATER,
                fix=f"{key}={near}" if near else f"add {name} to data.sets, or name one of {sets}",
            )
        elif stage in recipe.sft_stages and not has_traces(name):
            notes.error(
                f"{stage}.shard_set",
                f"{key}={name}: only sets called sft… have traces to learn from",
                cost=_LATER,
                fix="name a set that begins with sft",
            )
        elif stage in recipe.grpo_stages and name in taught:
            notes.warning(
                f"{stage}.same_rows",
                f"{key}={name} is also what SFT trains on: the paper's sets share no sample",
                cost="rewards for memorized answers",
                fix="give GRPO a set of its own",
            )


def checkpoints(case: RunCase, notes: Notes) -> None:
    """Check that there will be models and rows to score."""
    recipe = case.recipe
    if "predict" not in case.todo:
        return
    for name in recipe.scored_checkpoints:
        if name != BASE and name not in case.chosen and not case.is_done(name):
            notes.error(
                "eval.checkpoints",
                f"eval.checkpoints: no stage makes {name}: it is neither in stages nor done in "
                f"{case.root}",
                cost=_LATER,
                fix=f"take {name} out of eval.checkpoints, or add it to stages",
            )
    others = [name for name in recipe.predict.other_models if name in recipe.train]
    for name in others:
        if name not in case.chosen and not case.is_done(name):
            notes.error(
                "predict.models",
                f"predict.models: no stage makes {name}: it is neither in stages nor done in "
                f"{case.root}",
                cost=_LATER,
                fix=f"name another model in predict.models, or add {name} to stages",
            )
    trained = [stage for stage in recipe.in_order(recipe.stages) if stage in recipe.train]
    if trained and trained[-1] not in (*recipe.scored_checkpoints, *others):
        notes.warning(
            "eval.last",
            f"eval.checkpoints: {trained[-1]}, the last that is trained, is not among them",
            cost="a run whose result is not scored",
            fix=f"add {trained[-1]}",
        )
    if not recipe.eval.benchmarks:
        notes.warning(
            "eval.benchmarks",
            "eval.benchmarks is empty: no masks will be scored",
            cost="a run without J&F",
            fix="name a benchmark, or leave predict and eval out",
        )
    if recipe.eval.heldout_prompts:
        _heldout(case, notes)


def _heldout(case: RunCase, notes: Notes) -> None:
    """Check that the sets of held-out rows are there, or will be built.

    A stage that is still to be run needs its set itself, which `sets` and `built_shards` check.
    """
    recipe = case.recipe
    measured = set(recipe.heldout_stages.values())
    for stage, settings in recipe.grpo_stages.items():
        name = settings.shard_set
        known = name in recipe.data.sets
        built = case.shards(name).is_dir() or ("data" in case.todo and known)
        if stage not in case.todo and not built and (stage in measured or not known):
            notes.error(
                "eval.heldout",
                f"eval.heldout_prompts={recipe.eval.heldout_prompts} needs rows of "
                f"train.{stage}.shard_set={name}, which is nowhere",
                cost=_LATER,
                fix="eval.heldout_prompts=0, or name a set that is built",
            )


def zero_target(case: RunCase, notes: Notes) -> None:
    """Check that training and inference prompts agree on whether a target may be absent."""
    recipe = case.recipe
    share, asked = recipe.data.zero_target_share, recipe.predict.zero_target
    grounds = any("ktg" in rows_of(case, s) for s in recipe.train if s in recipe.stages)
    if "predict" in case.todo and grounds and (share > 0) != asked:
        notes.warning(
            "predict.zero_target",
            f"predict.zero_target={str(asked).lower()}, and data.zero_target_share={share:g}: the "
            "policy is asked with another prompt than it was trained with",
            cost="some points of J&F, without an error",
            fix=f"predict.zero_target={str(share > 0).lower()}",
        )
