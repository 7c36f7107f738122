"""`rcot preflight`: all that can be known of a run before anything is held, and what it will cost.

Imports no torch, ray, vllm, verl or transformers. Every check that `rcot run` makes when it starts
is made here, one after the other and not only up to the first fault, and further ones that need
arithmetic alone. What a run will do is printed as a plan, with the derivation of each estimate.

Left out for now: token counts of real rows, ports, contents of shards (`rcot data check`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from cluster import preflight
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe

GRPO = ("grpo-aks", "grpo-ktg")
PATCH = 28
"""Pixels of one vision token's side in Qwen2.5-VL."""


@dataclass
class Finding:
    """Something to mend, or to know."""

    code: str
    severity: Literal["error", "warning"]
    message: str
    cost: str
    """What it would have cost to find out later."""

    def text(self) -> str:
        """One line."""
        return f"{self.severity:<8}{self.code:<20}{self.message}  [{self.cost}]"


@dataclass
class Report:
    """What `examine` found."""

    recipe: str
    plan: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing stops the run."""
        return not any(f.severity == "error" for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"ok": self.ok, **asdict(self)}

    def text(self) -> str:
        """For the terminal."""
        lines = [f"{key:<22}{value}" for key, value in self.plan.items()]
        lines += [f.text() for f in self.findings]
        errors = sum(f.severity == "error" for f in self.findings)
        lines.append(f"{errors} errors, {len(self.findings) - errors} warnings")
        return "\n".join(lines)


def examine(recipe: Recipe, root: Path) -> Report:
    """Check a run of `recipe` in the folder `root` (which need not exist)."""
    report = Report(recipe.name, plan_of(recipe, root))
    place = next(p for p in (root, *root.absolute().parents) if p.exists())
    stages = list(recipe.stages)
    training = any(s in stages for s in ("sft", *GRPO))
    checks: list[tuple[str, str, bool, Callable[[], None]]] = [
        ("disk", "a run that dies at its first checkpoint", True,
         lambda: preflight._check_disk(place)),
        ("wandb", "a trainer that stops at a login prompt", training,
         lambda: preflight._check_wandb(recipe)),
        ("ray", "minutes of waiting for a cluster that is not there",
         any(s in stages for s in GRPO), lambda: preflight._check_ray(recipe)),
        ("engine", "an import error in a rollout worker", any(s in stages for s in GRPO),
         lambda: preflight._check_rollout_engine(recipe)),
        ("inputs", "a stage that fails when its turn comes", True,
         lambda: preflight._check_inputs(recipe, stages)),
        ("placement", "a trainer that waits for ever, without a word", training,
         lambda: _placement(recipe)),
        *(
            (f"{stage}.tokens", "an error at the first long prompt", stage in stages,
             lambda stage=stage: _tokens(recipe, stage))
            for stage in GRPO
        ),
        *(
            (f"{stage}.verl", "a key that verl ignores in silence", stage in stages,
             lambda stage=stage: _verl(recipe, stage))
            for stage in ("sft", *GRPO)
        ),
        *(
            (f"{stage}.shards", "a stage without rows", "data" not in stages and stage in stages,
             lambda stage=stage: _shards(recipe, stage, root))
            for stage in GRPO
        ),
    ]  # fmt: skip
    for code, cost, wanted, check in checks:
        if wanted:
            try:
                check()
            except InputError as error:
                report.findings.append(Finding(code, "error", str(error), cost))
    report.findings += _warnings(recipe)
    return report


def plan_of(recipe: Recipe, root: Path) -> dict[str, Any]:
    """What the run will do: for people, key by key."""
    ranks = recipe.cluster.nodes * recipe.cluster.gpus_per_node
    plan: dict[str, Any] = {
        "recipe": recipe.name,
        "folder": str(root),
        "stages": ", ".join(recipe.stages),
        "hosts": f"{recipe.cluster.nodes} x {recipe.cluster.gpus_per_node} {recipe.device} ranks",
    }
    for stage in GRPO:
        if stage not in recipe.stages:
            continue
        g = recipe.grpo(stage)
        each = g.prompts_per_step * g.n
        longest = g.max_prompt_length + g.max_response_length
        plan[stage] = (
            f"{g.steps} steps x {g.prompts_per_step} prompts x {g.n} responses = "
            f"{g.steps * each} responses of {longest} tokens at most; "
            f"{each // (ranks * g.micro_batch_size)} micro-batches a rank; reward {g.reward}"
        )
    parameters = _parameters(recipe)
    if parameters:
        plan |= _memory(recipe, parameters, ranks)
    return plan


def _memory(recipe: Recipe, parameters: int, ranks: int) -> dict[str, str]:
    gib = 2**30
    state = 16 * parameters / ranks / gib
    checkpoint = (12 + 2) * parameters / gib
    kept = recipe.grpo_ktg.keep_checkpoints
    free = shutil.disk_usage(Path.cwd()).free / gib
    return {
        "parameters": f"{parameters / 1e6:.1f} M",
        "trainer, a rank": f"{state:.2f} GiB: (4 weights + 4 gradients + 8 Adam) bytes x "
        f"parameters / {ranks} ranks, and activations",
        "reference, a rank": f"{state / 4:.2f} GiB: 4 bytes x parameters / {ranks} ranks",
        "rollout engine": f"{2 * parameters / gib:.2f} GiB of weights in bf16, its share of "
        f"memory {recipe.grpo_ktg.gpu_memory_utilization:.2f}",
        "checkpoint": f"{checkpoint:.2f} GiB: (4 weights + 8 Adam + 2 Hugging Face) bytes x "
        f"parameters; {kept or 'all'} kept, {free:.0f} GiB free",
    }


def _parameters(recipe: Recipe) -> int | None:
    """Of the policy, from its files' headers; None for one that is not here."""
    from rcot_rl.inference.model_folder import TINY, weight_shapes

    path = TINY if recipe.models.policy == "tiny" else Path(recipe.models.policy)
    try:
        return sum(prod(shape) for shape in weight_shapes(path).values())
    except (InputError, OSError):
        return None


def _placement(recipe: Recipe) -> None:
    """verl asks 3 CPUs for each GPU and one for each worker, and waits until it has them."""
    if recipe.device == "cpu" or recipe.cluster.ray_address != "local":
        return  # logical numbers on a CPU; another host's Ray is asked by its own
    cluster, there = recipe.cluster, os.cpu_count() or 1
    wanted = 3 * cluster.gpus_per_node + cluster.agent_workers + cluster.reward_workers
    wanted += cluster.queue_storage_units
    if wanted > there:
        raise InputError(
            f"verl asks {wanted} CPUs a node (3 x {cluster.gpus_per_node} GPUs, "
            f"{cluster.agent_workers} agent, {cluster.reward_workers} reward, "
            f"{cluster.queue_storage_units} storage workers); this host has {there}",
            key="cluster",
        )


def _tokens(recipe: Recipe, stage: str) -> None:
    section = recipe.grpo(stage)
    vision = (recipe.canvas.image // PATCH) ** 2
    if vision + 8 > section.max_prompt_length:
        raise InputError(
            f"an image of {recipe.canvas.image} pixels is {vision} tokens, and the prompt may have "
            f"{section.max_prompt_length}",
            key=f"{stage.replace('-', '_')}.max_prompt_length",
        )


def _verl(recipe: Recipe, stage: str) -> None:
    from rcot_rl.training.verl_config import grpo_config, sft_config

    here = Path("preflight")
    if stage == "sft":
        sft_config(recipe, model=here, train=[here], val=[], out=here)
    else:
        grpo_config(recipe, stage, model=here, train=[here], val=[here], out=here)


def _shards(recipe: Recipe, stage: str, root: Path) -> None:
    from rcot_rl.training.jobs import count_rows, split_files

    section = recipe.grpo(stage)
    folder = root / "shards" / section.shard_set
    rows = count_rows(split_files(folder, "train"))
    if rows < section.prompts_per_step:
        raise InputError(
            f"{rows} rows make no step of {section.prompts_per_step} prompts", file=folder
        )


def _warnings(recipe: Recipe) -> Iterator[Finding]:
    from rcot_rl.doctor import examine as examine_versions

    faults = examine_versions()
    if faults:
        more = f" and {len(faults) - 1} more (rcot doctor)" if len(faults) > 1 else ""
        yield Finding("versions", "warning", faults[0] + more, "a fault nobody else can repeat")
    if recipe.device == "cuda" and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding(
            "devices",
            "error",
            "CUDA_VISIBLE_DEVICES is empty: no GPU is visible",
            "a crash at start",
        )
    for stage in GRPO:
        section = recipe.grpo(stage)
        if stage in recipe.stages and section.save_every > section.steps:
            yield Finding(
                f"{stage}.saves", "warning",
                f"save_every={section.save_every} is beyond its {section.steps} steps: a failure "
                "starts it anew", "the whole stage",
            )  # fmt: skip
    if recipe.cluster.nodes > 1 and recipe.cluster.ray_address == "local":
        yield Finding(
            "nodes", "error",
            f"cluster.nodes={recipe.cluster.nodes}, but ray_address=local starts one host",
            "a trainer that waits for ever",
        )  # fmt: skip
