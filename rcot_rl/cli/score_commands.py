"""`rcot score`: scoring, and the reward lab beside it.

    rcot score REWARD [k=v …] [--in F] [--out F]     score responses (`rcot score --check REWARD`)
    rcot score explain | probe | replay …            see their --help

Anything that is none of the three names is a reward; one that is called like them is given by path.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperGroup

from rcot_rl.cli.faults import exit_with
from rcot_rl.errors import InputError
from rcot_rl.recipe.source import NOT_YAML

SCORE = "responses"
"""The command behind `rcot score REWARD`."""

RewardArgument = Annotated[
    str, typer.Argument(help="A reward's name, YAML file, FILE.py:FUNCTION or pkg://module.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Of a recipe, in YAML.")
]
Source = Annotated[Path | None, typer.Option("--in", help="JSON lines (standard input).")]


class _RewardOrCommand(TyperGroup):
    """A group whose first argument may be a reward."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [SCORE, *args]
        return super().parse_args(ctx, args)


score_app = typer.Typer(
    cls=_RewardOrCommand,
    no_args_is_help=True,
    help="Score responses offline (REWARD [--in F] [--out F]), and look into rewards.",
    subcommand_metavar="REWARD | COMMAND [ARGS]...",
)


@score_app.command(SCORE)
def responses(
    reward: RewardArgument,
    overrides: Overrides = None,
    source: Source = None,
    target: Annotated[
        Path | None, typer.Option("--out", help="JSON lines (standard output).")
    ] = None,
    segmenter: Annotated[
        str | None, typer.Option(help="For mask_iou: `tiny`, `flow`, or a SAM2 folder or hub id.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Do not score: hold the reward to its contract.")
    ] = False,
) -> None:
    """Score JSON lines of responses, one line each. The name may be left out."""
    maker = None
    if segmenter is not None:
        from rcot_rl.inference.segmenter_actor import LocalSegmenter

        maker = LocalSegmenter(segmenter)
    if check:
        from reward_fns.lab.contract_check import check_reward

        report = check_reward(reward, overrides=read_overrides(overrides), segmenter=maker)
        typer.echo(report.text())
        if not report.ok:
            exit_with([f"{reward}: {f.check}: {f.says}" for f in report.errors])
        return
    from reward_fns.score_lines import score_file

    score_file(reward, source, target, overrides=read_overrides(overrides), segmenter=maker)


@score_app.command()
def explain(
    reward: RewardArgument,
    overrides: Overrides = None,
    source: Source = None,
    line: Annotated[int, typer.Option(help="Which line of the input.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """One response: each item's match and distances, and the reason for every point lost."""
    from reward_fns.lab.explain import explain as explain_response
    from reward_fns.score import load_reward
    from reward_fns.score_lines import others_of, read_line

    row = read_line(source, line)
    known = load_reward(reward, overrides=read_overrides(overrides))
    found = explain_response(known, row["response"], row["ground_truth"], **others_of(row))
    typer.echo(json.dumps(found.as_dict()) if as_json else found.text())


@score_app.command()
def probe(
    reward: RewardArgument,
    overrides: Overrides = None,
    task: Annotated[str | None, typer.Option(help="aks or ktg; for a user's function.")] = None,
    strict: Annotated[bool, typer.Option(help="Status 2 when an exploit pays.")] = False,
) -> None:
    """What known exploits earn beside honest attempts."""
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
        list[str], typer.Option("--reward", help="Twice or more; 'NAME k=v …' with overrides.")
    ],
    stage: Annotated[str, typer.Option(help="Whose rollouts.")] = "grpo-ktg",
    out: Annotated[Path | None, typer.Option(help="Where replay.json and replay.html go.")] = None,
) -> None:
    """Rescore a run's rollouts: how means, spreads, advantages and rankings would have changed."""
    from rcot_rl.monitoring.reward_replay import replay as replay_run
    from rcot_rl.monitoring.reward_replay import replay_text, write_replay
    from reward_fns.score import load_reward

    if len(reward) < 2:
        raise InputError("name two rewards or more to compare", key="--reward")
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
    """`key.path=value` texts as a reward recipe's overrides. Raises InputError."""
    found = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InputError(f"'{text}' is not key.path=value", file="command line")
        try:
            found[key] = yaml.safe_load(value)
        except NOT_YAML as error:
            raise InputError(
                f"'{value}' is not a YAML value", file="command line", key=key
            ) from error
    return found or None


def run_canvas(run: Path) -> int:
    """The canvas that a run's policy saw, from its recipe. Raises InputError."""
    path = run / "recipe.yaml"
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        return int(record["recipe"]["canvas"]["image"])
    except OSError as error:
        raise InputError("no such run", file=path) from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"is no run's recipe: {error}", file=path) from error
