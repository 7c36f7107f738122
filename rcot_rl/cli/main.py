"""The console script: parses, calls one function, prints. `rcot --help`.

Exit status: 0 done; 2 the input or the configuration is at fault (one line on standard error);
1 anything else; 130 after Ctrl-C. Heavy modules are imported inside commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rcot_rl import __version__, variables
from rcot_rl.cli.checkpoint_commands import checkpoints_app
from rcot_rl.cli.data_commands import data_app
from rcot_rl.cli.faults import exit_with
from rcot_rl.cli.launch_commands import launch_app
from rcot_rl.cli.recipe_commands import recipe_app
from rcot_rl.cli.score_commands import score_app
from rcot_rl.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="RCoT-Seg: train a model to reason about video and to segment what a sentence means.",
)
app.add_typer(data_app, name="data")
app.add_typer(checkpoints_app, name="checkpoints")
app.add_typer(score_app, name="score")
app.add_typer(launch_app, name="launch")
app.add_typer(recipe_app, name="recipe")

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe's YAML file, or a shipped one's name.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, in YAML.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder (runs/<name>).")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"rcot {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(recipe: RecipeArgument, overrides: Overrides = None, out: Out = None) -> None:
    """Run the whole chain of a recipe; finished stages are skipped, unfinished ones resume."""
    _run_stages(recipe, overrides, out, None)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="A training stage; may be repeated (default: all).")
    ] = None,
) -> None:
    """The training stages only (the data stage must be done)."""
    from rcot_rl.chain import TRAINING

    for name in stage or ():
        if name not in TRAINING:
            raise InputError(f"'{name}' is not one of {', '.join(TRAINING)}", key="--stage")
    chosen = tuple(s for s in TRAINING if s in (stage or TRAINING))
    _run_stages(recipe, overrides, out, chosen, some=stage is None)


@app.command()
def sft(recipe: RecipeArgument, overrides: Overrides = None, out: Out = None) -> None:
    """CoT-SFT only (the data stage must be done)."""
    _run_stages(recipe, overrides, out, ("sft",))


@app.command()
def grpo(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    task: Annotated[
        str, typer.Option(help="aks, ktg, or both: those among the recipe's stages.")
    ] = "both",
) -> None:
    """The GRPO stages only."""
    tasks = {"aks": ("grpo-aks",), "ktg": ("grpo-ktg",), "both": ("grpo-aks", "grpo-ktg")}
    if task not in tasks:
        raise InputError(f"'{task}' is not aks, ktg or both", key="--task")
    _run_stages(recipe, overrides, out, tasks[task], some=task == "both")


@app.command("preflight")
def preflight_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    gpu_gib: Annotated[
        float | None, typer.Option(help="Memory of one GPU (default: asked here, or 48).", min=1)
    ] = None,
) -> None:
    """Everything that can be checked before a GPU is held; prints the plan and its costs."""
    from cluster.preflight.plan import examine_file

    found = examine_file(recipe, overrides or [], out, gpu_gib=gpu_gib, strict=not as_json)
    typer.echo(json.dumps(found.as_dict()) if as_json else found.text())
    if not found.ok:
        exit_with(found.errors)


@app.command()
def predict(recipe: RecipeArgument, overrides: Overrides = None, out: Out = None) -> None:
    """Predictions and held-out rewards of a run's checkpoints."""
    _run_stages(recipe, overrides, out, ("predict",))


def _run_stages(
    recipe: str,
    overrides: list[str] | None,
    out: Path | None,
    stages: tuple[str, ...] | None,
    some: bool = False,
) -> None:
    """stages: None: the recipe's. some: of `stages`, those that the recipe has, if it has any."""
    from rcot_rl.chain import run as run_chain
    from rcot_rl.recipe.loader import load_recipe

    # a command of one stage reads no other's section: `run_chain` looks at those that it needs
    loaded = load_recipe(recipe, overrides or [], needs=None if stages is None else ())
    if stages is not None and some:
        stages = tuple(s for s in stages if s in loaded.stages) or stages
    try:
        folder = run_chain(loaded, out or Path("runs") / loaded.name, stages)
    except KeyboardInterrupt:  # here, because typer would turn it into a bare "Aborted"
        _fail("stopped; the same command goes on from here", 130)
    if stages is None:
        from rcot_rl.monitoring.summary import summary_table

        typer.echo(summary_table(folder.root))


@app.command("eval")
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="<video>/<expression_id>/<frame>.png")],
    dataset: Annotated[str, typer.Option(help="The benchmark.")],
    corpus: Annotated[Path, typer.Option(help="Its folder.")],
    split: Annotated[str, typer.Option()] = "valid",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """J, F and J&F of predictions on a benchmark."""
    from rcot_rl.evaluation.benchmarks import evaluate as evaluate_predictions
    from rcot_rl.monitoring.summary import fault_lines, score_text

    result = evaluate_predictions(dataset, corpus, split, predictions)
    if as_json:
        typer.echo(json.dumps(result))
        return
    segmenter = result.get("segmenter") or "unknown"
    typer.echo(f"{dataset} {split}: {result['n_expressions']} expressions, masks by {segmenter}")
    typer.echo(f"J&F {score_text(result)}")
    for line in fault_lines(result):
        typer.echo(line)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """One self-contained HTML page of a run."""
    from rcot_rl.monitoring.report import write_report

    typer.echo(str(write_report(run_dir)))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs of one recipe.")],
    page: Annotated[Path | None, typer.Option(help="Also an HTML page with the curves.")] = None,
) -> None:
    """What GRPO changed over several runs (seeds): paired, with 95 % intervals, in Markdown."""
    from rcot_rl.files import write_text
    from rcot_rl.monitoring.compare import comparison_page, comparison_table

    typer.echo(comparison_table(runs))
    if page is not None:
        write_text(page, comparison_page(runs))


@app.command()
def segment(
    video: Annotated[Path, typer.Argument(help="An mp4, or a folder of frames.")],
    query: Annotated[str, typer.Argument(help="What to segment.")],
    out: Annotated[Path, typer.Option(help="Where masks, overlay and trace go.")] = Path(
        "segmented"
    ),
    model: Annotated[str, typer.Option(help="A Qwen2.5-VL folder or hub id, or `tiny`.")] = "tiny",
    sam2: Annotated[str, typer.Option(help="A SAM2 folder or hub id, `tiny` or `flow`.")] = "tiny",
    prompts: Annotated[str | None, typer.Option(help="A prompt set; default: the model's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    every: Annotated[int, typer.Option(help="Take every k-th frame.", min=1)] = 1,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out frames that cannot be decoded.")
    ] = False,
) -> None:
    """Segment what a sentence means in a video of one's own."""
    from rcot_rl.inference.segment import segment as segment_video

    if device not in ("cpu", "cuda"):
        raise InputError(f"'{device}' is not cpu or cuda", key="--device")
    trace = segment_video(
        video,
        query,
        out,
        model=model,
        sam2=sam2,
        prompts=prompts,
        device=device,
        every=every,
        skip_corrupt=skip_corrupt,
        announce=typer.echo,
    )
    typer.echo(f"keyframe {trace.keyframe}, {len(trace.boxes_source)} objects; see {out}")


@app.command()
def doctor() -> None:
    """Compare what is installed with the pinned versions."""
    from rcot_rl.doctor import examine

    faults = examine()
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(2)
    typer.echo("everything installed is as pinned")


def main() -> None:
    """The console script's entry point: errors become exit statuses here, and only here."""
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored below nohup
        signal.signal(signal.SIGHUP, _terminated)
    # a shell starts background jobs with SIGINT ignored: then nothing would answer to it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    variables.settle()
    try:
        app(_with_paths(sys.argv[1:]), prog_name="rcot")
    except InputError as error:
        _fail("\nrcot: ".join(error.faults), 2)
    except Exception as error:
        from cluster.supervise.processes import StageFailed
        from rcot_rl.disk import KINDS, explained

        if isinstance(error, OSError) and error.errno in KINDS:
            where = error.filename
            text = f"cannot be written: {explained(error, where or '.')}"
            _fail(str(InputError(text if where else f"a file {text}", file=where)), 2)
        if not isinstance(error, StageFailed):
            raise
        _fail(f"{error}\nthe whole log: {error.log}", 1)


_OPTION = re.compile(r"--[a-z][a-z0-9-]*(=.*)?", re.DOTALL)


def _with_paths(arguments: list[str]) -> list[str]:
    """The arguments with `./` before names of files that start with `-` and are no options.

    All options have two dashes and a word.
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
        print(f"rcot: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
