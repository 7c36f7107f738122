"""`rcot preflight`: all that can be known of a run before anything is held, and what it will cost.

`rcot run` and `rcot launch` make the same checks first: errors stop them, warnings are printed.
Imports no torch, ray, vllm, verl or transformers. All checks are made, one after the other and not
only up to the first fault; each finding has a code, what it would have cost, and the fix. What a
run will do is printed as a plan, with the derivation of each estimate. What cannot be checked here
(a model of the hub that is not on this host, say) is a finding of its own, `unknown`.

The checks are functions `check(case, notes)` in `checks/`; docs/preflight.md lists the codes.
Left out: real rows and pictures (`rcot data check`), other hosts (`rcot launch` asks them).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from cluster.preflight.checks import (
    estimates,
    host,
    inputs,
    rewards,
    shards,
    size,
    stages,
    tokens,
    training,
    verl,
)
from cluster.preflight.checks.case import GRPO, Case, HostFacts, host_facts
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
"""What a check looks at: the recipe alone, the run's files too, or the host that it runs on."""

CHECKS: tuple[tuple[Callable[[Case, Notes], None], Needs], ...] = (
    (host.folder, "files"),
    (host.space, "host"),
    (host.home, "host"),
    (host.versions, "host"),
    (host.provenance, "host"),
    (host.attention, "host"),
    (host.accounts, "host"),
    (host.ray, "host"),
    (host.devices, "host"),
    (host.shared_memory, "host"),
    (stages.order, "files"),
    (stages.sets, "recipe"),
    (stages.checkpoints, "files"),
    (stages.zero_target, "recipe"),
    (inputs.prompts, "recipe"),
    (inputs.policy, "files"),
    (inputs.writers, "files"),
    (inputs.trained, "files"),
    (inputs.segmenter, "files"),
    (inputs.corpora, "files"),
    (inputs.texts, "files"),
    (rewards.rewards, "recipe"),
    (rewards.clips, "recipe"),
    (shards.shards, "files"),
    (tokens.canvas, "host"),
    (tokens.prompts, "recipe"),
    (tokens.predict, "recipe"),
    (training.sft, "recipe"),
    (training.steps, "recipe"),
    (training.sampling, "recipe"),
    (training.objective, "recipe"),
    (training.engine, "recipe"),
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
    """Check a run of `recipe` in the folder `root` (which need not exist).

    gpu_gib: memory of a GPU; None: what nvidia-smi says here, or else the paper's 48.
    host: another host's numbers in place of this one's. stages: what is run; None: the recipe's.
    """
    try:
        root.exists()
    except OSError as error:  # a name that is too long, say
        notes = Notes()
        unwritable(notes, f"{root}: {error.strerror}")
        return Report(recipe.name, {}, notes.findings)
    if host is None:
        host = host_facts(root, look_for_gpu=recipe.device == "cuda")
    case = Case(recipe, root, host, gpu_gib, stages)
    notes = Notes()
    for check, _ in CHECKS:
        check(case, notes)
    return Report(recipe.name, plan_of(case), notes.findings)


def check_run(
    recipe: Recipe, root: Path, stages: tuple[str, ...], show: Callable[[str], None]
) -> None:
    """Make all checks before `stages` run in RUN = `root`, of those that are not done there.

    show: takes a line for each warning. Raises InputError with every error. Writes nothing.
    """
    with contextlib.suppress(OSError):  # a name that no folder can have: `examine` says so
        if all(RunFolder(root).is_done(stage) for stage in stages):
            return
    report = examine(recipe, root, stages=stages)
    for line in report.notices():
        show(line)
    report.raise_errors()


def check_launch(
    recipe: Recipe, root: Path, show: Callable[[str], None], *, shared: bool = False
) -> None:
    """Make the checks that can be made before a run on other hosts; arguments as `check_run`.

    root: RUN there. shared: this host sees the files that the others will see, as a login node
    does: they are looked at too, and what is missing is a warning, for it may be there later.
    """
    case = Case(recipe, root, host_facts(Path.cwd(), look_for_gpu=False), elsewhere=not shared)
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
    report = Report(recipe.name, {}, notes.findings)
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
    """As `examine`, from the recipe's file; root None: runs/<name>. A recipe that does not load is
    a report of one finding or, if `strict`, an InputError."""
    try:
        recipe = load_recipe(name_or_path, overrides)
    except InputError as error:
        if strict:
            raise
        return Report(str(name_or_path), {}, recipe_findings(error))
    return examine(recipe, root or Path("runs") / recipe.name, gpu_gib=gpu_gib)


def recipe_findings(error: InputError) -> list[Finding]:
    """The findings of a recipe that cannot be loaded, one for each fault."""
    return [_recipe_finding(fault) for fault in (error, *error.others)]


def _recipe_finding(error: InputError) -> Finding:
    code, fix = "recipe.value", "give the key a value of the kind that the message names"
    if "unknown key" in error.message:
        code, fix = "recipe.unknown_key", "correct the key's name, or leave it out"
    elif "is no multiple of" in error.message:
        code = "recipe.batches"
        fix = "make the batch a multiple of ranks x micro_batch_size, or lower micro_batch_size"
    elif error.key is None or error.message.startswith(("given twice", "holds itself")):
        code, fix = "recipe.file", "correct the file, or name another"
    return Finding(code, "error", error.faults[0], "nothing: no command takes such a recipe", fix)


def plan_of(case: Case) -> dict[str, Any]:
    """What the run will do: for people, key by key."""
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
    for stage in GRPO:
        if stage not in case.chosen:
            continue
        g = recipe.grpo(stage)
        each = g.prompts_per_step * g.n
        longest = g.max_prompt_length + g.max_response_length
        plan[stage] = (
            f"{g.steps} steps x {g.prompts_per_step} prompts x {g.n} responses = "
            f"{g.steps * each} responses of {longest} tokens at most; "
            f"{each // (case.ranks * g.micro_batch_size)} micro-batches a rank; reward {g.reward}"
        )
    return plan | tokens.room(case) | estimates.plan(case)
