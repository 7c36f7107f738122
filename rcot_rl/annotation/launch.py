"""Describing or tracing in a process of its own, watched and ended like a stage of a run.

python -m rcot_rl.annotation.launch PLAN.json      {"what", "recipe", "out"}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rcot_rl.errors import InputError
from rcot_rl.files import write_text
from rcot_rl.recipe.loader import dump_recipe, load_recipe
from rcot_rl.recipe.schema import Recipe

if TYPE_CHECKING:
    from cluster.supervise.processes import Host

FILES = {"describe": "descriptions.jsonl", "trace": "traces.jsonl"}
FAULT = "fault.txt"

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
    "rcot_rl.annotation.trace",
)
"""What the processes import; see cluster.supervise.zygote."""


def run_in(
    host: Host, what: str, recipe: Recipe, out: Path, log: Path, watch: Callable[[], None]
) -> Path:
    """Describe or trace (`what`) in a child of `host`; returns the file it wrote.

    Raises InputError for what the child found at fault, StageFailed for any other failure.
    """
    from cluster.supervise.processes import StageFailed

    out.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    fault = out / FAULT
    fault.unlink(missing_ok=True)
    plan = log.with_name(f"{what}.plan.json")
    resolved = log.with_name(f"{what}.recipe.yaml")
    write_text(resolved, dump_recipe(recipe))
    write_text(plan, json.dumps({"what": what, "recipe": str(resolved), "out": str(out)}))
    try:
        host.run(
            ["-m", "rcot_rl.annotation.launch", str(plan)],
            log,
            watch=watch,
            stall_timeout_s=recipe.cluster.stall_timeout_s,
        )
    except StageFailed:
        if fault.is_file():
            raise InputError(fault.read_text(encoding="utf-8")) from None
        raise
    return out / FILES[what]


def main(path: Path) -> None:
    """The child's side."""
    from rcot_rl.annotation.describe import describe
    from rcot_rl.annotation.trace import trace

    plan = json.loads(path.read_text(encoding="utf-8"))
    out = Path(plan["out"])
    try:
        recipe = load_recipe(plan["recipe"], needs=("data",))
        {"describe": describe, "trace": trace}[plan["what"]](recipe, out)
    except InputError as error:
        write_text(out / FAULT, str(error))
        sys.exit(f"rcot: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
