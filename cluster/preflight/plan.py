"""`rcot preflight`: check a run before any GPU is allocated, and estimate what it takes.

`rcot run` and `rcot launch` make the same checks first: errors stop them, warnings are printed.
Imports no torch, ray, vllm, verl or transformers. All checks run, not only up to the first fault.
Each finding has a code, what it would cost later, and the fix. The plan of the run shows, on
request, how each estimate is derived. What this host cannot check (a hub model that is not here,
say) is a finding of severity `unknown`.

The checks are functions `check(case, notes)` in `checks/`; docs/preflight.md lists the codes. Not
checked: real rows and images (`rcot data check`), other hosts (`rcot launch` asks them).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from cluster.preflight.checks import (
    built_shards,
    estimates,
    host,
    inputs,
    rewards,
    size,
    stage_order,
    token_limits,
    training_values,
    verl,
)
from cluster.preflight.checks.case import HostFacts, RunCase, host_facts
from cluster.preflight.checks.findings import Finding, Notes, Report
from cluster.preflight.checks.host import unwritable
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.recipe.schema import Recipe
from rcot_rl.runfolder import RunFolder

__all__ = [
    "Finding",
    "Report",
    "check_launch",
    "check_run",
    "examine",
    "examine_file",
    "plan_of",
    "recipe_findings",
]

Needs = Literal["recipe", "files", "host"]
"""What a check reads: the recipe alone, also the run's files, or also this host."""

CHECKS: tuple[tuple[Callable[[RunCase, Notes], None], Needs], ...] = (
    (host.folder, "files"),
    (host.space, "host"),
    (host.home, "host"),
    (host.versions, "host"),
    (host.provenance, "host"),
    (host.attention, "host"),
    (host.accounts, "host"),
    (host.trackers, "host"),
    (host.ray, "host"),
    (host.devices, "host"),
    (host.shared_memory, "host"),
    (stage_order.order, "files"),
    (stage_order.sets, "recipe"),
    (stage_order.checkpoints, "files"),
    (stage_order.zero_target, "recipe"),
    (inputs.prompts, "recipe"),
    (inputs.policy, "files"),
    (inputs.other_models, "files"),
    (inputs.writers, "files"),
    (inputs.trained, "files"),
    (inputs.segmenter, "files"),
    (inputs.corpora, "files"),
    (inputs.texts, "files"),
    (rewards.rewards, "recipe"),
    (rewards.clips, "recipe"),
    (built_shards.shards, "files"),
    (token_limits.canvas, "host"),
    (token_limits.prompts, "recipe"),
    (token_limits.predict, "recipe"),
    (training_values.sft, "recipe"),
    (training_values.steps, "recipe"),
    (training_values.sampling, "recipe"),
    (training_values.objective, "recipe"),
    (training_values.engine, "recipe"),
    (verl.version, "host"),
    (verl.keys, "recipe"),
    (size.known, "host"),
    (size.gpu, "host"),
    (size.host, "host"),
    (size.disk, "host"),
)


def examine(
    recipe: Recipe,
    root: Path,
    *,
    gpu_gib: float | None = None,
    host: HostFacts | None = None,
    stages: tuple[str, ...] | None = None,
) -> Report:
    """Check a run and return its plan and the findings. Writes nothing.

    Args:
        root: The run folder, which need not exist.
        gpu_gib: Memory of a GPU in GiB. None: as nvidia-smi reports it here, else the paper's 48.
        host: Numbers of the host that runs it. None: of this one.
    """
    try:
        root.exists()
    except OSError as error:  # a name that is too long, say
        notes = Notes()
        unwritable(notes, f"{root}: {error.strerror}")
        return Report(recipe.name, {}, notes.findings)
    if host is None:
        host = host_facts(root, look_for_gpu=recipe.device == "cuda")
    case = RunCase(recipe, root, host, gpu_gib, stages)
    notes = Notes()
    for check, _ in CHECKS:
        check(case, notes)
    brief = plan_of(case, explain=False)
    return Report(recipe.name, plan_of(case), notes.findings, recipe.grpo_stages, brief)


def check_run(
    recipe: Recipe, root: Path, stages: tuple[str, ...], show: Callable[[str], None]
) -> None:
    """Check the stages that are to run and are not done. Writes nothing. Raises InputError.

    Args:
        show: Called with a line for each warning.
    """
    with contextlib.suppress(OSError):  # a name that no folder can have: `examine` reports it
        if all(RunFolder(root).is_done(stage) for stage in stages):
            return
    report = examine(recipe, root, stages=stages)
    for line in report.notices():
        show(line)
    report.raise_errors()


def check_launch(
    recipe: Recipe, root: Path, show: Callable[[str], None], *, shared: bool = False
) -> None:
    """Check what can be checked before a run on other hosts. Writes nothing. Raises InputError.

    Args:
        shared: This host sees the files of the others, as a login node does. They are checked
            too, and what is missing is a warning, because it may be there later.
    """
    case = RunCase(recipe, root, host_facts(Path.cwd(), look_for_gpu=False), elsewhere=not shared)
    notes, files = Notes(), Notes()
    for check, needs in CHECKS:
        if needs == "recipe":
            check(case, notes)
        elif needs == "files" and shared:
            check(case, files)
    if shared:
        for finding in files.findings:
            if finding.severity == "error" and finding.code != "folder.recipe":
                finding.severity = "warning"
        notes.findings += files.findings
    report = Report(recipe.name, {}, notes.findings, recipe.grpo_stages)
    for line in report.notices():
        show(line)
    report.raise_errors()


def examine_file(
    name_or_path: str,
    overrides: Sequence[str] = (),
    root: Path | None = None,
    *,
    gpu_gib: float | None = None,
    strict: bool = False,
) -> Report:
    """Load a recipe and check a run of it.

    Args:
        strict: Raise the faults of a recipe that does not load, instead of reporting them.

    Raises:
        InputError: The recipe does not load, and `strict` is set.
    """
    try:
        recipe = load_recipe(name_or_path, overrides)
    except InputError as error:
        if strict:
            raise
        return Report(str(name_or_path), {}, recipe_findings(error))
    return examine(recipe, root or Path("runs") / recipe.name, gpu_gib=gpu_gib)


def recipe_findings(error: InputError) -> list[Finding]:
    """Return the findings of a recipe that cannot be loaded, one for each distinct fault."""
    distinct = {fault.faults[0]: fault for fault in (error, *error.others)}
    return [_recipe_finding(fault) for fault in distinct.values()]


def _recipe_finding(error: InputError) -> Finding:
    code, fix = "recipe.value", "correct the value as the message says"
    if "unknown key" in error.message:
        code, fix = "recipe.unknown_key", "correct the key's name, or remove it"
    elif "is not a multiple of" in error.message:
        code = "recipe.batches"
        fix = "make the batch a multiple of ranks x micro_batch_size, or lower micro_batch_size"
    elif error.key is None or error.message.startswith(("given twice", "recursive")):
        code, fix = "recipe.file", "correct the file, or name another"
    return Finding(code, "error", error.faults[0], "nothing: no command accepts this recipe", fix)


def plan_of(case: RunCase, explain: bool = True) -> dict[str, Any]:
    """Return what the run will do, as lines to print; explain: derive the estimates."""
    recipe = case.recipe
    plan: dict[str, Any] = {
        "recipe": recipe.name,
        "folder": str(case.root),
        "stages": ", ".join(case.chosen),
        "hosts": f"{recipe.cluster.nodes} x {recipe.cluster.gpus_per_node} {recipe.device} ranks",
    }
    done = [s for s in case.chosen if s not in case.todo]
    if done:
        plan["done before"] = ", ".join(done)
    for stage, g in recipe.grpo_stages.items():
        if stage not in case.chosen:
            continue
        each = g.prompts_per_step * g.n
        longest = g.max_prompt_length + g.max_response_length
        plan[stage] = (
            f"{g.steps} steps x {g.prompts_per_step} prompts x {g.n} responses = "
            f"{g.steps * each} responses of {longest} tokens at most; "
            f"{each // (case.ranks * g.micro_batch_size)} micro-batches a rank; reward {g.reward}"
        )
        if g.rehearse is not None:
            plan[stage] += f"; with rows of {g.rehearse}, reward {recipe.grpo(g.rehearse).reward}"
    return plan | token_limits.room(case) | token_limits.clips(case) | estimates.plan(case, explain)
