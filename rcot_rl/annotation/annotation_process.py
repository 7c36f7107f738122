"""Describe or trace in a child process that is supervised like a stage of a run.

python -m rcot_rl.annotation.annotation_process PLAN.json      {"work", "recipe", "out"}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from rcot_rl.events import child_process
from rcot_rl.recipe.loader import dump_recipe, load_recipe
from rcot_rl.recipe.schema import Recipe
from rcot_rl.system.files import write_text

Annotation = Literal["describe", "trace"]
FILES: dict[Annotation, str] = {"describe": "descriptions.jsonl", "trace": "traces.jsonl"}
TEXTS: dict[Annotation, str] = {"describe": "descriptions", "trace": "traces"}
"""What the console calls the results."""

PRELOAD = (
    "ray",
    "ray.data",
    "ray.data.llm",
    "torch",
    "cv2",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen2_5_vl",
    "rcot_rl.inference.batch",
    "rcot_rl.annotation.tracer",
)
"""What the processes import; see cluster.supervise.zygote."""


def child_arguments(work: Annotation, recipe: Recipe, out: Path, log: Path) -> list[str]:
    """Return the arguments of the child that describes or traces, with its plan beside the log."""
    out.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    plan = log.with_name(f"{work}.plan.json")
    resolved = log.with_name(f"{work}.recipe.yaml")
    write_text(resolved, dump_recipe(recipe))
    write_text(plan, json.dumps({"work": work, "recipe": str(resolved), "out": str(out)}))
    return ["-m", "rcot_rl.annotation.annotation_process", str(plan)]


def main(path: Path) -> None:
    """Do what the plan says."""
    from rcot_rl.annotation.describer import describe
    from rcot_rl.annotation.tracer import trace

    plan = json.loads(path.read_text(encoding="utf-8"))
    recipe = load_recipe(plan["recipe"], stages=())
    {"describe": describe, "trace": trace}[plan["work"]](recipe, Path(plan["out"]))


if __name__ == "__main__":
    with child_process():
        main(Path(sys.argv[1]))
