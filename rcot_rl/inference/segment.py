"""One video of the user's, one sentence: masks, an overlay and the trace (`rcot segment`).

OUT/masks/<frame>.png    single channel, 0 or 255, source size
OUT/overlay.mp4          the masks on the video; for a folder of frames, OUT/overlay/<frame>.jpg
OUT/trace.json           all that the model said, boxes, and what made the masks
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from data_pipelines.corpora.metadata import is_text
from rcot_rl.disk import explained
from rcot_rl.errors import InputError
from rcot_rl.files import visible
from rcot_rl.inference.draw import overlay
from rcot_rl.inference.engine import PolicyEngine
from rcot_rl.inference.model_folder import PolicyCard, check_model, find_model, read_card
from rcot_rl.inference.pipeline import Pipeline
from rcot_rl.inference.predict import TRACE, masks_of, write_masks
from rcot_rl.inference.prompting import Prompter
from rcot_rl.inference.segmenter import check_segmenter, load_segmenter
from rcot_rl.inference.trace import Clip, Query, Trace, as_dict
from rcot_rl.inference.video import Frames, read_clip, write_video
from rcot_rl.paths import check_path
from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.recipe.inference import EngineSection, PredictSection
from rcot_rl.recipe.schema import CanvasSection


def segment(
    video: Path,
    query: str,
    out: Path,
    *,
    model: str = "tiny",
    sam2: str = "tiny",
    prompts: str | None = None,
    image_canvas: int | None = None,
    video_canvas: int | None = None,
    engine: EngineSection | None = None,
    section: PredictSection | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    every: int = 1,
    skip_corrupt: bool = False,
    announce: Callable[[str], None] | None = None,
) -> Trace:
    """Segment what `query` refers to in `video` (mp4 or folder of frames) and write `out`.

    model: `tiny`, a Qwen2.5-VL folder or hub id; sam2: what `load_segmenter` takes. Prompts and
    canvases default to those of the checkpoint's `rcot.json`, else to the paper's. every: take
    every k-th frame. skip_corrupt: go on without frames that cannot be decoded; the trace says how
    many (`missing_frames`), and so does `announce`. `out` appears whole or not at all.
    Raises InputError before anything heavy starts, where the input allows.
    """
    if not query.strip():
        raise InputError("the query is empty")
    for text, what in ((query, "the query"), (str(video), "the video's name")):
        if not is_text(text):
            raise InputError(f"{what} is not in this locale's encoding: {text!a}")
    _check_device(device)
    check_segmenter(sam2)  # before a policy is downloaded or loaded
    if every < 1:
        raise InputError("must be at least 1", key="every")
    check_path(video)
    check_path(out)
    out = out.resolve()
    if out.exists() and (not out.is_dir() or visible(out.iterdir())):
        raise InputError("already there and not empty; choose another folder", file=out)
    _partial(out).rmdir()  # what cannot be written is said before anything is loaded
    folder = find_model(model)
    check_model(folder)
    card = read_card(folder) or PolicyCard()
    templates = load_prompts(prompts or card.prompts)
    canvas = _canvas(image_canvas or card.image_canvas, video_canvas or card.video_canvas)
    frames = read_clip(video, every, skip_corrupt=skip_corrupt)
    if frames.missing and announce is not None:
        announce(f"{video}: left out {frames.missing} frames that cannot be decoded")
    given = section or PredictSection()
    _check_length(folder, engine or EngineSection(), given, len(frames.names), canvas, every)
    segmenter = load_segmenter(sam2, device)
    clip = Clip(str(video), len(frames.names), frames.images.__getitem__)
    with PolicyEngine(folder, engine or EngineSection(), device=device) as policy:
        pipeline = Pipeline(policy, templates, given, canvas)
        trace = pipeline.run([Query(clip, query)])[0]
    masks = masks_of(trace, frames.images, segmenter)
    more = {
        "video": str(video),
        "keyframe_name": frames.names[trace.keyframe],
        "n_frames": len(frames.names),
        "missing_frames": frames.missing,
        "source_size": list(frames.images.shape[1:3]),
        "model": model,
        "prompts": templates.name,
        "canvas": canvas.model_dump(),
        "segmenter": segmenter.name,
    }
    write_result(out, frames, masks, as_dict(trace, **more), as_video=video.is_file())
    return trace


def write_result(
    out: Path, frames: Frames, masks_thw: np.ndarray, trace: dict, *, as_video: bool
) -> None:
    """Masks, overlay and trace at `out`, in one step; in a folder that is there, the trace last.
    Raises InputError if `out` cannot be made."""
    partial = _partial(out)
    try:
        (partial / "masks").mkdir()
        write_masks(partial / "masks", frames.names, masks_thw)
        drawn = (_drawn(frames, masks_thw, trace, t) for t in range(len(frames.names)))
        if as_video:
            write_video(partial / "overlay.mp4", drawn, frames.rate)
        else:
            (partial / "overlay").mkdir()
            for name, image in zip(frames.names, drawn, strict=True):
                file = str(partial / "overlay" / f"{name}.jpg")
                if not cv2.imwrite(file, cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
                    raise RuntimeError(f"{file} could not be written")
        text = json.dumps(trace, ensure_ascii=False, indent=1)
        (partial / TRACE).write_text(text + "\n", encoding="utf-8")
        if partial.parent == out:
            for entry in sorted(partial.iterdir(), key=lambda e: e.name == TRACE):
                os.replace(entry, out / entry.name)
        else:
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(out: Path) -> Path:
    """A new folder in which `out` (resolved) is made: inside of it if it is there, since it may be
    a mount. Raises InputError when that cannot be."""
    name = f".{out.name}.partial-{os.getpid()}"
    partial = out / name if out.is_dir() else out.with_name(name)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot be written: {explained(error, out)}", file=out) from error
    return partial


def _check_device(device: str) -> None:
    if device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError("no GPU that torch can use is visible", key="--device")
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("vLLM for GPUs is not installed", key="--device") from error


def _check_length(
    folder: Path,
    engine: EngineSection,
    section: PredictSection,
    n_frames: int,
    canvas: CanvasSection,
    every: int,
) -> None:
    """That the model takes so long a video. Raises InputError with the stride that would do."""
    if not (section.vdg or section.kfg or section.rounds):
        return
    shown = min(n for n in (section.max_frames, n_frames) if n)
    prompter = Prompter(folder, engine.max_model_len)
    tokens = prompter.media_tokens("video", (canvas.video, canvas.video), shown)
    if tokens >= prompter.max_model_len:
        stride = every * -(-11 * tokens // (10 * prompter.max_model_len))
        raise InputError(
            f"{n_frames} frames make {tokens} tokens, and the model takes "
            f"{prompter.max_model_len}; take every {stride}th, say",
            key="--every",
        )


def _drawn(frames: Frames, masks_thw: np.ndarray, trace: dict, t: int) -> np.ndarray:
    at_key = t == trace["keyframe"]
    boxes = trace["boxes_source"] if at_key else []
    points = trace["points_source"] if at_key else []
    return overlay(frames.images[t], masks_thw[t], boxes, points)


def _canvas(image: int, video: int) -> CanvasSection:
    for key, side in (("image-canvas", image), ("video-canvas", video)):
        if side < 28 or side % 28:
            raise InputError(f"must be a multiple of 28 pixels (is {side})", key=key)
    return CanvasSection(image=image, video=video)
