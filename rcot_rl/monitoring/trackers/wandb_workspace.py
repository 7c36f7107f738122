"""A saved W&B workspace: the charts of a run folder or a project, in sections by question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rcot_rl.errors import InputError
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.trackers.tracked_stage import run_id_of
from rcot_rl.monitoring.trackers.value_key import value_key
from rcot_rl.monitoring.trackers.wandb_tracker import group_name
from rcot_rl.prediction_layout import benchmark_name

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

TASKS = ("aks", "ktg")
COLUMNS = ("run:jobType", "summary:state", "summary:restarts", "summary:minutes")


def save_workspace(run: Path | None, project: str | None, entity: str | None) -> str:
    """Save a workspace of a run folder, or of a whole project; return its URL.

    Raises:
        InputError: The folder is no run, or the server refuses.
    """
    group, title, benchmarks = None, "RCoT-Seg", []
    if run is not None:
        reader = RunReader(run)
        recipe = reader.recipe
        if recipe is None:
            raise InputError("no recipe.yaml of a run", file=run)
        group = group_name(reader.name, run_id_of(run))
        title = f"RCoT-Seg: {group}"
        project, entity = recipe.wandb.project, entity or recipe.wandb.entity
        benchmarks = [benchmark_name(b.dataset, b.split) for b in recipe.eval.benchmarks]
    assert project is not None
    import wandb
    from wandb.errors import Error
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        entity = entity or wandb.Api().default_entity
        view = workspace(str(entity), project, title, group=group, benchmarks=benchmarks)
        return str(view.save().url)
    except (Error, WandbApiFailedError) as error:
        raise InputError(str(error).partition("\n")[0], key="wandb") from error


def workspace(
    entity: str, project: str, name: str, *, group: str | None, benchmarks: Sequence[str]
) -> Workspace:
    """Return a workspace; its `save` sends it to the server.

    Args:
        entity: W&B user or team.
        project: W&B project.
        name: Title of the view.
        group: Show only the runs of this group, which is one run folder. None: all.
        benchmarks: Benchmarks of the runs, such as `mevis-valid_u`.
    """
    from wandb_workspaces import expr
    from wandb_workspaces.workspaces import RunsetSettings, Workspace, WorkspaceSettings

    return Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections(benchmarks),
        settings=WorkspaceSettings(x_axis="Step", max_runs=20),
        runset_settings=RunsetSettings(
            filters=[expr.Metric("Group") == group] if group else [],
            groupby=[] if group else [expr.Metric("Group")],
            pinned_columns=list(COLUMNS),
        ),
    )


def sections(benchmarks: Sequence[str]) -> list[Section]:
    """Return the sections: a question, a sentence on how to read the answer, and charts."""
    from wandb_workspaces.reports.v2 import (
        BarPlot,
        LinePlot,
        MarkdownPanel,
        WeavePanelSummaryTable,
    )
    from wandb_workspaces.reports.v2.interface import PanelTypes
    from wandb_workspaces.workspaces import Section

    def line(title: str, *metrics: str) -> LinePlot:
        return LinePlot(title=title, x="Step", y=list(metrics))

    def lines(title: str, prefix: str, suffix: str = "", stacked: bool = False) -> LinePlot:
        pattern = f"^{re.escape(prefix)}/.+{re.escape(suffix)}$"
        style: Literal["line", "stacked-area"] = "stacked-area" if stacked else "line"
        return LinePlot(title=title, x="Step", metric_regex=pattern, plot_type=style)

    def bars(title: str, *metrics: str) -> BarPlot:
        return BarPlot(title=title, metrics=list(metrics))

    def table(name: str) -> WeavePanelSummaryTable:
        return WeavePanelSummaryTable(table_name=name)

    heldout = [f"heldout_{task}_sampled" for task in TASKS]
    changes = [f"{key}_change" for key in heldout]
    scores = [value_key(f"J&F_{benchmark}") for benchmark in benchmarks]
    contents: dict[str, tuple[str, list[PanelTypes]]] = {
        "Is the reward rising?": (
            "The sampled reward rises and then flattens. If it falls below half of its best, stop "
            "and lower the learning rate.",
            [line("reward", "reward/mean"), line("KL to the reference", "actor/kl_loss")],
        ),
        "Through which component?": (
            "Accuracy must rise, not only format. Reasons say what points are lost for.",
            [lines("components", "reward", "/mean"), lines("reasons for lost points", "reason")],
        ),
        "Does the held-out reward agree?": (
            "If the sampled reward rises and this does not, the policy learns the prompts, or "
            "games the reward.",
            [
                bars("held-out reward of the checkpoint", *heldout),
                bars("change from the stage before", *changes),
                table("heldout_rewards"),
            ],
        ),
        "Do the masks follow?": (
            "J&F of the checkpoint on each benchmark.",
            [
                *([bars("J&F", *scores)] if scores else []),
                table("scores"),
                table("table_13_keyframes"),
                table("aks_confusion"),
            ],
        ),
        "Are the groups healthy?": (
            "A group whose responses have equal rewards gives no gradient. Too easy: take harder "
            "prompts. Too hard: train longer with CoT-SFT. A high share of truncated responses "
            "needs a greater max_response_length.",
            [
                line(
                    "groups without gradient",
                    "group/zero_variance_fraction",
                    "group/too_easy_fraction",
                    "group/too_hard_fraction",
                ),
                line("response length", "response_length/mean"),
                line("truncated responses", "response_length/clip_ratio"),
                line("entropy", "actor/entropy"),
            ],
        ),
        "What does it point at?": (
            "Toggle ground truth, boxes, points and masks in a picture.",
            [table("rollouts_same_prompts"), table("rollouts")],
        ),
        "Is the system busy?": (
            "Rollouts take most of a step. Rising memory or a shrinking disk ends a run.",
            [
                lines("seconds of a step", "timing_s", stacked=True),
                line("tokens per second", "perf/throughput"),
                line("MFU", "perf/mfu/actor", "train/mfu"),
                lines("GPU", "gpu"),
                lines("host memory (GiB)", "memory_gib", "/max"),
                line("disk left (GiB)", "disk/free_gib"),
            ],
        ),
    }
    return [
        Section(name=question, panels=[MarkdownPanel(markdown=text), *panels], is_open=number < 4)
        for number, (question, (text, panels)) in enumerate(contents.items())
    ]
