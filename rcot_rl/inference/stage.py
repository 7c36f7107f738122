"""The predict stage's process: `python -m rcot_rl.inference.stage PLAN.json`.

One vLLM engine, in which the checkpoints of a run take turns: each answers the held-out prompts,
then every benchmark goes through the pipeline. What is there already is not done again.

    RUN/predict/rewards.json                      held-out rewards of each checkpoint and task
    RUN/predict/<checkpoint>/<benchmark>/…        predictions (layout: rcot_rl.inference.predict)
    RUN/predictions/<benchmark>/…                 those of the last checkpoint
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from data_pipelines.corpora import open_corpus
from rcot_rl.errors import InputError
from rcot_rl.files import write_text
from rcot_rl.inference.engine import PolicyEngine
from rcot_rl.inference.heldout import heldout_rewards, read_rows
from rcot_rl.inference.model_folder import fingerprint
from rcot_rl.inference.predict import predict
from rcot_rl.inference.segmenter import load_segmenter
from rcot_rl.inference.segmenter_actor import LocalSegmenter
from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.recipe.schema import Recipe
from rcot_rl.recipe.training import GrpoSection
from reward_fns.score import load_reward

FIRST_FRAME = "first-frame"
"""The baseline without keyframe selection: the first frame, as in the paper's Table 3."""


def run(plan: dict[str, Any]) -> None:
    """plan: recipe, checkpoints [[name, folder]], benchmarks, heldout {task: shards}, out."""
    recipe = load_recipe(plan["recipe"], needs=("predict",))
    out = Path(plan["out"])
    checkpoints = [(name, Path(folder)) for name, folder in plan["checkpoints"]]
    segmenter = load_segmenter(recipe.models.segmenter, recipe.device)
    masks = LocalSegmenter(segmenter)
    _say(event="engine", message=f"starting vLLM on {checkpoints[0][0]}")
    with PolicyEngine(
        checkpoints[0][1], recipe.engine, device=recipe.device, seed=recipe.seed
    ) as engine:
        for name, folder in checkpoints:
            if engine.model != folder:
                engine.load_checkpoint(folder)
            _heldout(recipe, plan["heldout"], name, engine, masks, out)
            for benchmark in plan["benchmarks"]:
                _predict(recipe, benchmark, name, engine, segmenter, _place(plan, name, benchmark))
        if recipe.eval.baselines:
            plain = recipe.model_copy(
                update={"predict": recipe.predict.model_copy(update={"kfg": False, "rounds": 0})}
            )
            for benchmark in plan["benchmarks"]:
                place = out / "predict" / FIRST_FRAME / benchmark["dataset"]
                _predict(plain, benchmark, FIRST_FRAME, engine, segmenter, place)


def _place(plan: dict[str, Any], name: str, benchmark: dict[str, Any]) -> Path:
    out = Path(plan["out"])
    if name == plan["checkpoints"][-1][0]:
        return out / "predictions" / benchmark["dataset"]
    return out / "predict" / name / benchmark["dataset"]


def _predict(
    recipe: Recipe,
    benchmark: dict[str, Any],
    name: str,
    engine: PolicyEngine,
    segmenter: Any,
    place: Path,
) -> None:
    corpus = open_corpus(benchmark["dataset"], Path(benchmark["root"]), benchmark["split"])
    what = f"{name} on {benchmark['dataset']}"
    predict(
        corpus,
        engine,
        load_prompts(recipe.prompts),
        recipe.predict,
        recipe.canvas,
        segmenter,
        place,
        model=fingerprint(engine.model),
        seed=recipe.seed,
        limit=benchmark["limit"],
        progress=lambda done, total: _say(event="predict", what=what, done=done, total=total),
    )


def _heldout(
    recipe: Recipe,
    shards: dict[str, list[str]],
    name: str,
    engine: PolicyEngine,
    masks: LocalSegmenter,
    out: Path,
) -> None:
    path = out / "predict" / "rewards.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for task, files in shards.items():
        if recipe.eval.heldout_prompts == 0 or name in known.get(task, {}):
            continue
        section = recipe.grpo(f"grpo-{task}")
        rows = read_rows([Path(f) for f in files], recipe.eval.heldout_prompts, task)
        known.setdefault(task, {})[name] = heldout_rewards(
            engine,
            rows,
            load_reward(
                heldout_reward(section),
                canvas=recipe.canvas.image,
                deadline_s=section.reward_deadline_s,
                segmenter=masks,
            ),
            k=recipe.eval.heldout_samples,
            temperature=section.temperature,
            max_tokens=section.max_response_length,
            seed=recipe.seed,
            count=engine.count_tokens,
        )
        _say(event="heldout", what=f"{name}, {task}", **_means(known[task][name]))
        write_text(path, json.dumps(known, indent=1))


def heldout_reward(section: GrpoSection) -> str:
    """The reward of held-out rows, each a single question: an agentic stage's is of episodes."""
    return "aks" if section.agent == "agentic-aks" else section.reward


def _means(result: dict[str, Any]) -> dict[str, float]:
    return {way: round(result[way]["mean"], 3) for way in ("sampled", "greedy")}


def _say(**event: Any) -> None:
    print("RCOT " + json.dumps(event), flush=True)


def main(path: Path) -> None:
    """Status 2 for what is at fault in the run's input: starting again would not mend it."""
    try:
        run(json.loads(path.read_text(encoding="utf-8")))
    except InputError as error:
        print(f"rcot: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
