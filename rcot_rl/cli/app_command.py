"""`rcot app`: the local web page."""

from __future__ import annotations

from typing import Annotated, Literal, cast

import typer

from rcot_rl.cli.segment_command import Device, Model, PromptSet, Sam2
from rcot_rl.errors import InputError


def app_command(
    model: Model = "tiny-trained",
    sam2: Sam2 = "tiny",
    prompts: PromptSet = None,
    device: Device = "cpu",
    port: Annotated[
        int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.", min=0, max=65535)
    ] = 7860,
    max_upload_mib: Annotated[int, typer.Option(help="Largest video in MiB.", min=1)] = 200,
    max_video_frames: Annotated[
        int, typer.Option(help="Most frames of a video.", min=1, max=10_000)
    ] = 600,
    max_frames: Annotated[
        int | None, typer.Option(help="Show the policy at most this many frames.", min=1)
    ] = None,
) -> None:
    """Serve a local web page: segment your own video, with every step of the model shown."""
    from rcot_rl.inference.app import serve
    from rcot_rl.inference.app_jobs import AppLimits
    from rcot_rl.inference.segment import SegmentModels

    if device not in ("cpu", "cuda"):
        raise InputError(f"'{device}' is not cpu or cuda", key="--device")
    models = SegmentModels(
        model, sam2, prompts=prompts, device=cast(Literal["cpu", "cuda"], device)
    )
    limits = AppLimits(max_upload_mib << 20, max_video_frames, max_frames)
    typer.echo(f"loading {model} and the segmenter {sam2} on {device}", err=True)
    serve(models, port, limits, lambda url: typer.echo(f"open {url} (Ctrl-C stops the app)"))
