"""The preflight's checks of what a run reads: prompts, policy, segmenter, corpora, texts."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.preflight import at_start
from cluster.preflight.checks.case import RunCase
from cluster.preflight.checks.findings import Notes
from cluster.preflight.checks.policy_facts import policy_facts
from rcot_rl.errors import InputError
from rcot_rl.protocol.frame_names import FrameNames
from rcot_rl.recipe.data_section import has_traces
from rcot_rl.recipe.training_section import BASE
from rcot_rl.suggestions import did_you_mean

_LATER = "a stage that fails when its turn comes"


def prompts(case: RunCase, notes: Notes) -> None:
    """Check that the prompt set is complete, and has what traces need."""
    from rcot_rl.protocol.prompts import load_prompts

    recipe = case.recipe
    if case.elsewhere and Path(recipe.prompts).suffix and not Path(recipe.prompts).is_file():
        notes.unknown(
            "inputs.prompts",
            f"prompts: {recipe.prompts} is not on this host, and was not checked",
            cost=_LATER,
            fix="the run checks it where it starts",
        )
        return
    with notes.attempt(
        "inputs.prompts",
        cost=_LATER,
        fix="name a shipped set, or give yours all templates",
    ):
        prompt_set = load_prompts(recipe.prompts, response=recipe.data.response)
        sections = [recipe.predict.reasoning(v) for v in (None, *recipe.predict.variants)]
        if "predict" in case.todo and any(s.frame_names == "seconds" for s in sections):
            prompt_set.kfg("", 1, names=FrameNames((0.0,)))
            prompt_set.kfg_again("", 1, [], "", names=FrameNames((0.0,)))
        if "data" in case.todo and "trace" in recipe.data.generated:
            for task in ("aks", "ktg"):
                if f"trace_{task}" not in prompt_set.templates:
                    raise InputError(
                        f"has no template trace_{task}, which data.trace=model needs",
                        file=recipe.prompts,
                        key="prompts",
                    )


def policy(case: RunCase, notes: Notes) -> None:
    """Check that the base policy is here and complete, or can be downloaded later."""
    from rcot_rl.inference.model_folder import check_model, read_card

    spec, facts = case.recipe.models.policy, case.policy
    writes = "data" in case.todo and case.recipe.data.generated
    if not (writes or case.training or "predict" in case.todo):
        return
    if facts.folder is None and facts.hub_id:
        _hub(notes, "inputs.policy", "models.policy", spec)
        return
    with notes.attempt(
        "inputs.policy",
        cost=_LATER,
        fix="name the folder of a complete Qwen2.5-VL checkpoint, a hub id, or `tiny`",
    ):
        folder = facts.folder or Path(spec)
        check_model(folder)
        card = read_card(folder)
        canvas = case.recipe.canvas
        asked = (case.recipe.prompts, canvas.image, canvas.video)
        if card is not None and (card.prompts, card.image_canvas, card.video_canvas) != asked:
            notes.warning(
                "inputs.card",
                f"{folder / 'rcot.json'}: trained with prompts {card.prompts} and "
                f"canvases {card.image_canvas}, {card.video_canvas}; the recipe has {asked[0]} and "
                f"{asked[1]}, {asked[2]}",
                cost="prompts that the policy never learned",
                fix="use the card's prompts and canvas",
            )


def other_models(case: RunCase, notes: Notes) -> None:
    """Check the models that `predict.models` names for single tasks."""
    from rcot_rl.inference.model_folder import check_model, is_hub_id

    recipe = case.recipe
    if "predict" not in case.todo:
        return
    for name in recipe.predict.other_models:
        if name == BASE or name in recipe.train:
            continue
        if is_hub_id(name):
            _hub(notes, "inputs.models", "predict.models", name)
            continue
        hint = did_you_mean(name, (BASE, *recipe.train))
        with notes.attempt(
            "inputs.models",
            cost=_LATER,
            fix=f"name a stage of the recipe, base, a folder or a hub id{hint}",
        ):
            check_model(Path(name))


def writers(case: RunCase, notes: Notes) -> None:
    """Check the models that write descriptions and traces, if they are not the base policy."""
    from rcot_rl.inference.model_folder import check_model

    data = case.recipe.data
    sections = {"describe": "describer", "trace": "tracer"}
    for name in (sections[work] for work in data.generated):
        spec = getattr(data, name).model
        if "data" not in case.todo or spec in (None, case.recipe.models.policy):
            continue
        facts, key = policy_facts(spec), f"data.{name}.model"
        if facts.folder is None and facts.hub_id:
            _hub(notes, "inputs.writer", key, spec)
            continue
        with notes.attempt(
            "inputs.writer",
            cost=_LATER,
            fix=f"name in {key} the folder of a complete Qwen2.5-VL checkpoint, or a hub id",
        ):
            check_model(facts.folder or Path(spec))


def trained(case: RunCase, notes: Notes) -> None:
    """Check that the models of finished stages, which later ones read, are still complete."""
    from rcot_rl.inference.model_folder import check_model

    recipe = case.recipe
    read = set(recipe.scored_checkpoints) if "predict" in case.todo else set()
    read |= {recipe.reference_of(stage) for stage in case.training}
    for stage in recipe.train:
        if stage in read and case.is_done(stage) and (case.root / stage / "model").exists():
            with notes.attempt(
                "inputs.trained",
                cost=_LATER,
                fix=f"copy RUN/{stage}/model again, or train the stage again in another --out",
            ):
                check_model(case.root / stage / "model")


def _hub(notes: Notes, code: str, key: str, spec: str) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        notes.error(
            code,
            f"{key}: {spec} is not on this host, and HF_HUB_OFFLINE forbids downloads",
            cost=_LATER,
            fix="download it where that is possible, and name its folder",
        )
    else:
        notes.unknown(
            code,
            f"{key}: {spec} is neither a folder nor in the hub's cache here; whether the hub has "
            "it, and whether it is complete, was not checked",
            cost=_LATER,
            fix=f"`hf download {spec}` now, or name its folder",
        )


def segmenter(case: RunCase, notes: Notes) -> None:
    """Check SAM2 if a stage makes masks."""
    from cluster.preflight.checks.policy_facts import cached
    from rcot_rl.segmentation.segmenter import check_segmenter, check_segmenter_folder

    spec = case.recipe.models.segmenter
    needed = "predict" in case.todo or case.recipe.data.alignment.level == "sam2"
    if not needed and not any(_makes_masks(case, stage) for stage in case.grpo):
        return
    with notes.attempt(
        "inputs.segmenter",
        cost="days of training, and no masks at their end",
        fix="name a Sam2Video folder, a .pt file of SAM2, a hub id, `tiny` or `flow`",
    ):
        source = check_segmenter(spec)
        if source is not None and not Path(source).exists():
            snapshot = cached(source)
            if snapshot is None:
                _hub(notes, "inputs.segmenter", "models.segmenter", source)
            else:
                check_segmenter_folder(snapshot)


def _makes_masks(case: RunCase, stage: str) -> bool:
    from cluster.preflight.checks.rewards import modules_of

    return "mask_iou" in modules_of(case, stage)


def corpora(case: RunCase, notes: Notes) -> None:
    """Check that every corpus is where the recipe says, with the split that it names."""
    recipe = case.recipe
    named = []
    if "data" in case.todo:
        named += [
            (f"data.corpora.{i}", c.dataset, c.root, c.split)
            for i, c in enumerate(recipe.data.corpora)
        ]
    if "predict" in case.todo or "eval" in case.todo:
        named += [
            (f"eval.benchmarks.{i}", b.dataset, b.root, b.split)
            for i, b in enumerate(recipe.eval.benchmarks)
        ]
    for key, dataset, root, split in named:
        code = "inputs.corpus" if key.startswith("data") else "inputs.benchmark"
        with notes.attempt(
            code,
            cost="days of training, and nothing to score on" if key.startswith("eval") else _LATER,
            fix="put the corpus there in its public layout, or correct its root and split",
        ):
            at_start.check_corpus(recipe, dataset, root, key)
            if root is None:
                _toy_split(case, dataset, split, key)
            else:
                from data_pipelines.corpora import open_corpus

                corpus = open_corpus(dataset, root, split)
                if key.startswith("eval") and "eval" in case.todo and not corpus.has_masks:
                    notes.warning(
                        "eval.masks",
                        f"{key}: {dataset} {split} in {root} has no masks: it is predicted, "
                        "but not scored",
                        cost="a table without this benchmark",
                        fix="submit predictions to the benchmark's server, or name another split",
                    )
    _leak(case, notes)


def _toy_split(case: RunCase, dataset: str, split: str, key: str) -> None:
    toy = case.recipe.toy
    splits = [c.split for c in toy.corpora if c.layout == dataset] if toy else []
    if split not in splits:
        raise InputError(
            f"the recipe's toy corpora of {dataset} have no split {split!r}"
            f"{did_you_mean(split, splits)} (only {', '.join(splits)})",
            key=f"{key}.split",
        )


def _leak(case: RunCase, notes: Notes) -> None:
    trained = {(c.dataset, c.root, c.split) for c in case.recipe.data.corpora}
    for i, b in enumerate(case.recipe.eval.benchmarks):
        if (b.dataset, b.root, b.split) in trained:
            notes.warning(
                "eval.leak",
                f"eval.benchmarks.{i}: {b.dataset} {b.split} is also in data.corpora",
                cost="a score on the training data",
                fix="score on another split",
            )


def texts(case: RunCase, notes: Notes) -> None:
    """Check the descriptions and traces that rows are made with."""
    if "data" not in case.todo:
        return
    data = case.recipe.data
    for key, value in (("describe", data.describe), ("trace", data.trace)):
        if key == "trace" and not any(has_traces(name) for name in data.sets):
            continue
        fix = f"run `rcot data {key}`, or set data.{key}=model"
        if value == "model" or (
            key == "trace" and value == "template" and data.response == "answer"
        ):
            continue
        if value == "template":
            real = [
                c.root
                for c in data.corpora
                if c.root is not None
                and Path(c.root).is_dir()
                and not (Path(c.root) / "toy.json").is_file()
            ]
            if real:
                notes.error(
                    "inputs.texts",
                    f"data.{key}=template, and {real[0]} is no toy corpus (it has no toy.json)",
                    cost=_LATER,
                    fix=fix,
                )
        elif not Path(value).is_file():
            hint = did_you_mean(value, ["template", "model"])
            notes.error(
                "inputs.texts",
                f"data.{key}: no such file: {value}{hint}",
                cost=_LATER,
                fix=fix,
            )
