"""`rcot score`: score responses offline, and inspect rewards.

    rcot score REWARD [k=v …] [--in F] [--out F]     score responses (`rcot score --check REWARD`)
    rcot score explain | probe | replay …            see their --help

A first argument other than these three commands is a reward. Give a reward with such a name by its
path.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from rcot_rl.cli.default_command import group_with_default
from rcot_rl.cli.faults import exit_with
from rcot_rl.errors import InputError

SCORE = "responses"
"""The command behind `rcot score REWARD`."""

RewardArgument = Annotated[
    str, typer.Argument(help="A reward: name, YAML file, FILE.py:FUNCTION or pkg://module.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of a reward recipe; values in YAML."),
]
Source = Annotated[Path | None, typer.Option("--in", help="JSON lines (default: standard input).")]


score_app = typer.Typer(
    cls=group_with_default(SCORE),
    no_args_is_help=True,
    help="Score responses offline (REWARD [--in F] [--out F]), and inspect rewards.",
    subcommand_metavar="REWARD | COMMAND [ARGS]...",
)


@score_app.command(SCORE)
def responses(
    reward: RewardArgument,
    overrides: Overrides = None,
    source: Source = None,
    target: Annotated[
        Path | None, typer.Option("--out", help="JSON lines (default: standard output).")
    ] = None,
    segmenter: Annotated[
        str | None, typer.Option(help="For mask_iou: `tiny`, `flow`, or a SAM2 folder or hub id.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Check that the reward meets its contract; score nothing."),
    ] = False,
) -> None:
    """Score responses in JSON lines; one line of output each. `responses` can be omitted."""
    maker = None
    if segmenter is not None:
        from rcot_rl.segmentation.segmenter_actor import LocalSegmenter

        maker = LocalSegmenter(segmenter)
    if check:
        from reward_fns.lab.contract_check import check_reward

        report = check_reward(reward, overrides=read_overrides(overrides), segmenter=maker)
        typer.echo(report.text())
        if not report.ok:
            exit_with([f"{reward}: {f.check}: {f.message}" for f in report.errors])
        return
    from reward_fns.score_lines import score_file

    score_file(reward, source, target, overrides=read_overrides(overrides), segmenter=maker)


@score_app.command()
def explain(
    reward: RewardArgument,
    overrides: Overrides = None,
    source: Source = None,
    line: Annotated[int, typer.Option(help="Line of the input.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Explain the reward of one response: matches, distances and the reason for each deduction."""
    from reward_fns.lab.explain import explain as explain_response
    from reward_fns.score import load_reward
    from reward_fns.score_lines import others_of, read_line

    row = read_line(source, line)
    known = load_reward(reward, overrides=read_overrides(overrides))
    result = explain_response(known, row["response"], row["ground_truth"], **others_of(row))
    typer.echo(json.dumps(result.as_dict()) if as_json else result.text())


@score_app.command()
def probe(
    reward: RewardArgument,
    overrides: Overrides = None,
    task: Annotated[str | None, typer.Option(help="Task of your own function: aks or ktg.")] = None,
    strict: Annotated[bool, typer.Option(help="Status 2 if an exploit pays.")] = False,
) -> None:
    """Compare the rewards of known exploits with those of honest responses."""
    from reward_fns.lab.probe import probe as probe_reward
    from reward_fns.lab.probe import table
    from reward_fns.score import load_reward

    findings = probe_reward(load_reward(reward, overrides=read_overrides(overrides)), task)
    typer.echo(table(findings))
    if strict and any(f.pays or f.is_slow for f in findings):
        raise typer.Exit(2)


@score_app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    reward: Annotated[
        list[str],
        typer.Option(
            "--reward", help="A reward, or 'NAME k=v …' with overrides; give at least two."
        ),
    ],
    stage: Annotated[str, typer.Option(help="GRPO stage of the rollouts.")] = "grpo-ktg",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of replay.json and replay.html (default: RUN/replay)."),
    ] = None,
) -> None:
    """Rescore a run's rollouts and compare means, spreads, advantages and rankings."""
    from rcot_rl.monitoring.pages.reward_replay import replay as replay_run
    from rcot_rl.monitoring.pages.reward_replay import replay_text, write_replay
    from reward_fns.score import load_reward

    if len(reward) < 2:
        raise InputError("give at least two rewards to compare", key="--reward")
    canvas = run_canvas(run)
    rewards = {}
    for spec in reward:
        name, *overrides = spec.split()
        rewards[spec] = load_reward(name, canvas=canvas, overrides=read_overrides(overrides))
    result = replay_run(run, stage, rewards)
    typer.echo(replay_text(result))
    page = write_replay(run, result, out or run / "replay")
    typer.echo(str(page))


def read_overrides(given: list[str] | None) -> dict[str, Any] | None:
    """Return `key.path=value` texts as a reward recipe's overrides; None if there are none.

    Raises:
        InputError: A text has another form, or its value is not valid YAML.
    """
    from rcot_rl.recipe.layers import parse_override

    return dict(map(parse_override, given or [])) or None


def run_canvas(run: Path) -> int:
    """Return the image canvas of a run in pixels. Raises InputError if it has no valid recipe."""
    path = run / "recipe.yaml"
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        return int(record["recipe"]["canvas"]["image"])
    except OSError as error:
        raise InputError("no such file; name the folder of a run", file=path) from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"is not the recipe of a run: {error}", file=path) from error
