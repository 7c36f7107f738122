"""`rcot segment`: expressions about one's own video, or about a drawn clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from rcot_rl.errors import InputError
from rcot_rl.recipe.inference_section import LIGHT_FRAMES

Model = Annotated[
    str,
    typer.Option(help="A Qwen2.5-VL folder or hub id, `tiny-trained` or `tiny`."),
]
Sam2 = Annotated[str, typer.Option(help="A SAM2 folder or hub id, `tiny` or `flow`.")]
PromptSet = Annotated[str | None, typer.Option(help="A prompt set (default: the model's).")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def segment(
    video: Annotated[
        Path | None,
        typer.Argument(help="An mp4, or a folder of frames; with --demo: the output folder."),
    ] = None,
    queries: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUERY...", help="Descriptions of what to segment, each in quotes."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="Output folder for masks, overlay and trace; OUT/<number> for several."),
    ] = Path("segmented"),
    model: Model = "tiny-trained",
    sam2: Sam2 = "tiny",
    prompts: PromptSet = None,
    device: Device = "cpu",
    rounds: Annotated[
        int | None, typer.Option(help="Maximum number of keyframe judgements (default: 5).", min=0)
    ] = None,
    light: Annotated[
        bool, typer.Option("--light", help=f"Select again from {LIGHT_FRAMES} frames only.")
    ] = False,
    max_frames: Annotated[
        int | None, typer.Option(help="Show the policy at most this many frames.", min=1)
    ] = None,
    every: Annotated[
        int, typer.Option(help="Show the policy every k-th frame; all get masks.", min=1)
    ] = 1,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Skip frames that cannot be decoded.")
    ] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="Segment a drawn clip; needs no video and no query.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Segment the objects that sentences describe in your own video."""
    from rcot_rl.inference.demo_clip import DEMO_INDEX, unseen_clip, write_clip_video
    from rcot_rl.inference.segment import SegmentModels, check_new_folder
    from rcot_rl.inference.segment import segment as segment_video
    from rcot_rl.monitoring.terminal.console import Console
    from rcot_rl.recipe.inference_section import PredictSection

    if device not in ("cpu", "cuda"):
        raise InputError(f"'{device}' is not cpu or cuda", key="--device")
    if demo and queries:
        raise InputError("takes an output folder only; its clip and query are fixed", key="--demo")
    if not demo and (video is None or not queries):
        raise InputError("name a video and at least one query, or pass --demo")
    given = {"rounds": rounds, "max_frames": max_frames}
    section = PredictSection.model_validate({k: v for k, v in given.items() if v is not None})
    if light:
        section = section.model_copy(update={"reevaluate_frames": LIGHT_FRAMES})
    console = Console()
    models = SegmentModels(
        model,
        sam2,
        prompts=prompts,
        section=section,
        device=cast(Literal["cpu", "cuda"], device),
    )
    if demo:
        folder = video or out
        check_new_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        scene, query = unseen_clip(DEMO_INDEX)
        video, queries, out = folder / "clip.mp4", [query.text], folder / "segmented"
        write_clip_video(video, scene)
        console.line("the same as this command:")
        typer.echo(f'rcot segment {video} "{query.text}" --out {out}', err=True)  # to be copied
    assert video is not None and queries is not None
    outcomes = segment_video(
        video,
        queries,
        out,
        models,
        every=every,
        skip_corrupt=skip_corrupt,
        say=console.line,
        progress=console.progress,
    )
    if as_json:
        results = [o.as_dict() | {"out": str(o.out), "summary": o.sentence()} for o in outcomes]
        typer.echo(json.dumps({"video": str(video), "out": str(out), "queries": results}))
        return
    for outcome in outcomes:
        typer.echo(outcome.sentence())
        typer.echo(f"  overlay: {outcome.overlay}, picture: {outcome.out / 'strip.png'}")
