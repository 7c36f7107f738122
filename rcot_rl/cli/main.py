"""The console script `rcot`: parse the arguments, call one function, print the result.

Exit status: 0 for success; 2 if the input or configuration is invalid (one line per fault on
standard error); 130 after Ctrl-C; 1 for any other failure. Commands import heavy modules inside
their functions.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rcot_rl import __version__
from rcot_rl.cli.app_command import app_command
from rcot_rl.cli.checkpoint_commands import checkpoints_app
from rcot_rl.cli.data_commands import data_app
from rcot_rl.cli.faults import exit_with
from rcot_rl.cli.launch_commands import launch_app
from rcot_rl.cli.recipe_commands import recipe_app
from rcot_rl.cli.score_commands import score_app
from rcot_rl.cli.segment_command import segment
from rcot_rl.cli.study_command import study_app
from rcot_rl.cli.wandb_commands import wandb_app
from rcot_rl.cli.watch_command import watch_command
from rcot_rl.errors import InputError
from rcot_rl.system import variables
from rcot_rl.system.lines import wrapped
from rcot_rl.system.logs import configure_logging

if TYPE_CHECKING:
    from rcot_rl.recipe.schema import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="RCoT-Seg: train a model to reason about video and segment what a query describes.",
)
app.add_typer(data_app, name="data")
app.add_typer(checkpoints_app, name="checkpoints")
app.add_typer(score_app, name="score")
app.add_typer(launch_app, name="launch")
app.add_typer(recipe_app, name="recipe")
app.add_typer(wandb_app, name="wandb")
app.add_typer(study_app, name="study")
app.command("app")(app_command)

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe's YAML file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides; values in YAML.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder (default: runs/<name>).")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"rcot {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Log each component and its values to stderr."),
    ] = False,
) -> None:
    if verbose:
        configure_logging(logging.INFO)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    checked: Annotated[
        bool, typer.Option("--checked", hidden=True, help="The launcher has run the preflight.")
    ] = False,
) -> None:
    """Run all stages of a recipe. Finished stages are skipped; an interrupted stage resumes."""
    from rcot_rl.recipe.loader import load_recipe

    _run_stages(load_recipe(recipe, overrides or []), out, None, checked=checked)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="A training stage; repeatable (default: all).")
    ] = None,
) -> None:
    """Run only training stages. The shards must exist."""
    from rcot_rl.recipe.loader import load_recipe
    from rcot_rl.suggestions import did_you_mean

    loaded = load_recipe(recipe, overrides or [], stages=())
    for name in stage or ():
        if name not in loaded.train:
            known = ", ".join(loaded.train)
            hint = did_you_mean(name, loaded.train)
            raise InputError(f"'{name}' is not one of {known}{hint}", key="--stage")
    stages = loaded.in_order(stage or set(loaded.stages) & set(loaded.train) or loaded.train)
    if not stages:
        raise InputError("the recipe has no training stage", key="train")
    _run_stages(loaded, out, stages)


@app.command("preflight")
def preflight_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    gpu_gib: Annotated[
        float | None, typer.Option(help="GiB of one GPU (default: this host's, or 48).", min=1)
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show how each estimate is derived.")
    ] = False,
) -> None:
    """Check a run before any GPU is allocated, and print its plan and costs."""
    from cluster.preflight.plan import examine_file
    from rcot_rl.system.lines import width_of

    result = examine_file(recipe, overrides or [], out, gpu_gib=gpu_gib, strict=not as_json)
    text = result.text(explain=explain, width=min(100, width_of(sys.stdout)))
    typer.echo(json.dumps(result.as_dict()) if as_json else text)
    if not result.ok:
        exit_with(result.errors, shown=not as_json and sys.stdout.isatty())


@app.command()
def predict(recipe: RecipeArgument, overrides: Overrides = None, out: Out = None) -> None:
    """Predict with a run's checkpoints and compute their held-out rewards."""
    from rcot_rl.recipe.loader import load_recipe

    _run_stages(load_recipe(recipe, overrides or [], stages=()), out, ("predict",))


def _run_stages(
    recipe: Recipe, out: Path | None, stages: tuple[str, ...] | None, *, checked: bool = False
) -> None:
    """Run `stages`. None: run the recipe's stages and print a summary."""
    from rcot_rl.chain import run as run_chain

    try:
        root = out or Path("runs") / recipe.name
        folder = run_chain(recipe, root, stages, checked=checked)
    except KeyboardInterrupt:  # typer would print only "Aborted"
        _fail("interrupted; rerun the same command to resume", 130)
    if stages is None:
        from rcot_rl.monitoring.terminal.run_summary import summary_table

        typer.echo(summary_table(folder.root))


@app.command("eval")
def evaluate(
    predictions: Annotated[
        list[Path],
        typer.Argument(
            metavar="PRED_DIR...", help="Folders of <video>/<expression_id>/<frame>.png."
        ),
    ],
    dataset: Annotated[str, typer.Option(help="Dataset of the benchmark.")],
    corpus: Annotated[Path, typer.Option(help="Folder of the dataset.")],
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "valid",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes (default: all CPUs).", min=1)
    ] = None,
    table: Annotated[
        Path | None, typer.Option("--csv", help="Also write the scores of each expression.")
    ] = None,
) -> None:
    """Score predicted masks on a benchmark: J, F and J&F.

    Several folders are scored in one pass and compared in pairs.
    """
    from rcot_rl.evaluation.benchmarks import benchmark_document, evaluate_all
    from rcot_rl.evaluation.score_table import score_table
    from rcot_rl.monitoring.terminal.console import Console
    from rcot_rl.monitoring.terminal.run_summary import evaluation_lines
    from rcot_rl.system.files import write_text

    methods = {str(folder): folder for folder in predictions}
    progress = partial(Console().progress, "expressions")
    results = evaluate_all(dataset, corpus, split, methods, workers=workers, progress=progress)
    if table is not None:
        write_text(table, score_table(results))
    complete = benchmark_document(results, {})
    if as_json:
        typer.echo(json.dumps(complete if len(results) > 1 else results[str(predictions[0])]))
        return
    typer.echo("\n".join(evaluation_lines(complete)))


@app.command()
def submit(
    predictions: Annotated[
        Path,
        typer.Argument(metavar="PRED_DIR", help="Folder of <video>/<expression_id>/<frame>.png."),
    ],
    dataset: Annotated[str, typer.Option(help="mevis or ref-youtube-vos.")],
    corpus: Annotated[Path, typer.Option(help="Folder of the dataset.")],
    out: Annotated[Path, typer.Option(help="The archive, a .zip.")],
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "valid",
    allow_missing: Annotated[
        bool,
        typer.Option("--allow-missing", help="Submit empty masks for missing predictions."),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes (default: all CPUs).", min=1)
    ] = None,
) -> None:
    """Write the archive that a benchmark's evaluation server scores, and check it."""
    from rcot_rl.evaluation.submission import write_submission
    from rcot_rl.monitoring.terminal.console import Console
    from rcot_rl.monitoring.terminal.run_summary import submission_lines

    written = write_submission(
        dataset,
        corpus,
        split,
        predictions,
        out,
        allow_missing=allow_missing,
        workers=workers,
        progress=Console().progress,
    )
    typer.echo("\n".join(submission_lines(written._asdict())))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report, one self-contained HTML page."""
    from rcot_rl.monitoring.pages.report import write_report

    typer.echo(str(write_report(run_dir)))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs of one recipe.")],
    page: Annotated[Path | None, typer.Option(help="Also write an HTML page with curves.")] = None,
) -> None:
    """Compare metrics before and after GRPO over several runs (seeds), as a Markdown table.

    Differences are paired and have 95 % confidence intervals.
    """
    from rcot_rl.monitoring.pages.compare import comparison_table
    from rcot_rl.monitoring.pages.compare_page import comparison_page
    from rcot_rl.system.files import write_text

    typer.echo(comparison_table(runs))
    if page is not None:
        write_text(page, comparison_page(runs))


app.command()(segment)
app.command("watch")(watch_command)


@app.command()
def doctor() -> None:
    """List this host's versions, GPUs and memory, and compare the packages with the lock.

    The exit status is 2 if a package is missing or has another version than its pin.
    """
    from rcot_rl.system.doctor import examine, inventory, lock_of_host
    from rcot_rl.system.lines import fold, width_of

    for name, value in inventory():
        lines = fold(value, width_of(sys.stdout), f"{name:<14} ", " " * 15)
        typer.echo("\n".join(lines))
    faults = examine()
    sys.stdout.flush()
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(2)
    typer.echo(f"{lock_of_host().name:<14} all packages have their pinned versions")


def main() -> None:
    """Run the console script. Only this function turns errors into exit statuses."""
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, _terminated)
    # a shell starts background jobs with SIGINT ignored, so that Ctrl-C would have no effect
    signal.signal(signal.SIGINT, signal.default_int_handler)
    configure_logging(logging.WARNING)
    variables.settle()
    try:
        app(_with_paths(sys.argv[1:]), prog_name="rcot")
    except InputError as error:
        _fail("\nrcot: ".join(error.faults), 2)
    except Exception as error:
        from cluster.supervise.processes import StageFailed
        from rcot_rl.system.disk import KINDS, explained

        if isinstance(error, OSError) and error.errno in KINDS:
            where = error.filename
            text = f"cannot be written: {explained(error, where or '.')}"
            _fail(str(InputError(text if where else f"a file {text}", file=where)), 2)
        if not isinstance(error, StageFailed):
            raise
        _fail(f"{error}\nfull log: {error.log}", 1)


_OPTION = re.compile(r"-v|--[a-z][a-z0-9-]*(=.*)?", re.DOTALL)


def _with_paths(arguments: list[str]) -> list[str]:
    """Return the arguments with `./` before names of files that start with `-`.

    Options stay as they are: two dashes and a word, or `-v`.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [
        f"./{a}" if a.startswith("-") and not _OPTION.fullmatch(a) and os.path.lexists(a) else a
        for a in arguments[:end]
    ]
    return options + arguments[end:]


def _terminated(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _fail(message: str, status: int) -> NoReturn:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(wrapped(f"rcot: {message}", sys.stderr), file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
