"""The preflight's checks of the order of stages: each finds what the one before it leaves."""

from __future__ import annotations

from cluster.preflight.checks.case import GRPO, TRAINING, Case
from cluster.preflight.checks.findings import Notes
from cluster.preflight.checks.rewards import tasks_of
from rcot_rl.recipe.schema import section_key
from rcot_rl.suggestions import did_you_mean, nearest

_LATER = "a stage that fails when its turn comes, days later"


def order(case: Case, notes: Notes) -> None:
    """A stage's predecessor is in `stages`, or done in this folder."""
    recipe = case.recipe
    needs = {
        "grpo-aks": ["sft"], "grpo-ktg": ["sft"], "eval": ["predict"], "report": [],
    }  # fmt: skip
    if "grpo-aks" in recipe.stages and not _begun(case, "grpo-ktg"):
        needs["grpo-ktg"].append("grpo-aks")  # the recipe's order, whichever stages are chosen
    for stage in case.todo:
        for before in needs.get(stage, []):
            if before not in case.chosen and not case.is_done(before):
                notes.error(
                    "stages.order", f"stages: {stage} begins with what {before} leaves, which is "
                    f"neither among them nor done in {case.root}", cost=_LATER,
                    fix=f"add {before} to stages, or give --out the folder in which it is done",
                )  # fmt: skip
    _start(case, notes)
    _adapters(case, notes)
    if len(set(recipe.stages)) < len(recipe.stages):
        twice = next(s for s in recipe.stages if recipe.stages.count(s) > 1)
        notes.warning(
            "stages.twice", f"stages: {twice} is named twice, and runs once", cost="a surprise",
            fix="name it once",
        )  # fmt: skip


def _start(case: Case, notes: Notes) -> None:
    """KTG alone starts where AKS ended only if that is in the folder; one stage of both has no AKS
    before it."""
    alone = "grpo-ktg" in case.todo and "grpo-aks" not in case.recipe.stages
    if alone and not case.is_done("grpo-aks") and "aks" not in tasks_of(case, "grpo-ktg"):
        notes.warning(
            "stages.start", f"stages: grpo-ktg without grpo-aks, which is not done in {case.root} "
            "either: its policy starts at CoT-SFT's model", cost="another experiment than the "
            "paper's, without an error", fix="add grpo-aks to stages, or give --out its folder",
        )  # fmt: skip


def _begun(case: Case, stage: str) -> bool:
    return any(case.root.glob(f"{stage}/checkpoints/global_step_*"))


def _adapters(case: Case, notes: Notes) -> None:
    """KTG goes on with AKS's weights, which are those of its adapter, or whole ones."""
    follows = "grpo-aks" in case.recipe.stages or case.is_done("grpo-aks")
    starts = "grpo-ktg" in case.todo and follows and not _begun(case, "grpo-ktg")
    if not starts or None in (case.recipe.grpo_aks, case.recipe.grpo_ktg):
        return
    both = [case.recipe.grpo(s) for s in GRPO]
    ranks = [g.verl_value("actor_rollout_ref.model.lora_rank", g.lora_rank) for g in both]
    if ranks[0] != ranks[1]:
        said = ["none" if rank is None else str(rank) for rank in ranks]
        notes.error(
            "grpo-ktg.adapter", f"grpo_aks.lora_rank is {said[0]}, grpo_ktg.lora_rank {said[1]}: "
            "the weights that AKS leaves do not fit KTG's model",
            cost="all of AKS, before KTG fails to load",
            fix=f"grpo_ktg.lora_rank={'null' if ranks[0] is None else said[0]}",
        )  # fmt: skip


def sets(case: Case, notes: Notes) -> None:
    """Shard sets that stages train on are among those that the data stage builds."""
    if "data" not in case.todo:
        return  # `checks_shards` looks at what is there
    known = case.recipe.data.sets
    for stage in case.training:
        section = case.recipe.sft if stage == "sft" else case.recipe.grpo(stage)
        key, name = f"{section_key(stage)}.shard_set", section.shard_set
        if name not in known:
            near = nearest(name, known)
            notes.error(
                f"{stage}.shard_set",
                f"{key}={name} is none of data.sets{did_you_mean(name, known)}",
                cost=_LATER, fix=f"{key}={near}" if near
                else f"add {name} to data.sets, or name one of them: {', '.join(known)}",
            )  # fmt: skip
        elif stage == "sft" and not name.startswith("sft"):
            notes.error(
                "sft.shard_set", f"{key}={name}: only sets called sft… have traces to learn from",
                cost=_LATER, fix="name a set that begins with sft",
            )  # fmt: skip
        elif stage != "sft" and name == case.recipe.sft.shard_set:
            notes.warning(
                f"{stage}.same_rows", f"{key}={name} is also what SFT trains on: the paper's sets "
                "share no sample", cost="rewards of what was learned by heart",
                fix="give GRPO a set of its own",
            )  # fmt: skip


def checkpoints(case: Case, notes: Notes) -> None:
    """Checkpoints that are to be scored are made by some stage."""
    recipe = case.recipe
    if "predict" not in case.todo:
        return
    for name in recipe.eval.checkpoints:
        if name != "base" and name not in case.chosen and not case.is_done(name):
            notes.error(
                "eval.checkpoints", f"eval.checkpoints: no stage makes {name}: it is neither in "
                f"stages nor done in {case.root}", cost=_LATER,
                fix=f"take {name} out of eval.checkpoints, or add it to stages",
            )  # fmt: skip
    made = [s for s in TRAINING if s in recipe.stages]
    if made and made[-1] not in recipe.eval.checkpoints:
        notes.warning(
            "eval.last", f"eval.checkpoints: {made[-1]}, the last that is trained, is not among "
            "them", cost="a run whose result nobody sees", fix=f"add {made[-1]}",
        )  # fmt: skip
    if not recipe.eval.benchmarks:
        notes.warning(
            "eval.benchmarks", "eval.benchmarks is empty: no masks will be scored",
            cost="a run without J&F", fix="name a benchmark, or leave predict and eval out",
        )  # fmt: skip
    if recipe.eval.heldout_prompts:
        for stage in GRPO:
            name = recipe.grpo(stage).shard_set
            size = recipe.data.sets.get(name)
            if stage not in recipe.stages and size is None and not case.shards(name).is_dir():
                notes.error(
                    "eval.heldout", f"eval.heldout_prompts={recipe.eval.heldout_prompts} asks "
                    f"{section_key(stage)}.shard_set={name} for rows, and it is nowhere",
                    cost=_LATER, fix="eval.heldout_prompts=0, or name a set that is built",
                )  # fmt: skip


def zero_target(case: Case, notes: Notes) -> None:
    """Prompts of training and inference agree on whether there may be nothing to find."""
    share, asked = case.recipe.data.zero_target_share, case.recipe.predict.zero_target
    if "predict" in case.todo and "grpo-ktg" in case.recipe.stages and (share > 0) != asked:
        notes.warning(
            "predict.zero_target", f"predict.zero_target={str(asked).lower()}, and "
            f"data.zero_target_share={share:g}: the policy is asked with another prompt than it "
            "was trained with", cost="some points of J&F, without an error",
            fix=f"predict.zero_target={str(share > 0).lower()}",
        )  # fmt: skip
