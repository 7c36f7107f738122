"""One video of the user's, one sentence: masks, an overlay and the trace (`rcot segment`).

OUT/masks/<frame>.png    single channel, 0 or 255, source size
OUT/overlay.mp4          the masks on the video; for a folder of frames, OUT/overlay/<frame>.jpg
OUT/trace.json           all that the model said, boxes, and what made the masks
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.inference.draw import overlay
from rcot_rl.inference.engine import PolicyEngine
from rcot_rl.inference.model_folder import PolicyCard, check_model, find_model, read_card
from rcot_rl.inference.pipeline import Pipeline
from rcot_rl.inference.predict import TRACE, masks_of, write_masks
from rcot_rl.inference.segmenter import load_segmenter
from rcot_rl.inference.trace import Clip, Query, Trace, as_dict
from rcot_rl.inference.video import Frames, read_clip, write_video
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
) -> Trace:
    """Segment what `query` refers to in `video` (mp4 or folder of frames) and write `out`.

    model: `tiny`, a Qwen2.5-VL folder or hub id; sam2: what `load_segmenter` takes. Prompts and
    canvases default to those of the checkpoint's `rcot.json`, else to the paper's. every: take
    every k-th frame. `out` appears whole or not at all.
    Raises InputError before anything heavy starts, where the input allows.
    """
    if not query.strip():
        raise InputError("the query is empty")
    if every < 1:
        raise InputError("must be at least 1", key="every")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("already there and not empty; choose another folder", file=out)
    folder = find_model(model)
    check_model(folder)
    card = read_card(folder) or PolicyCard()
    templates = load_prompts(prompts or card.prompts)
    canvas = _canvas(image_canvas or card.image_canvas, video_canvas or card.video_canvas)
    frames = read_clip(video, every)
    segmenter = load_segmenter(sam2, device)
    clip = Clip(str(video), len(frames.names), frames.images.__getitem__)
    with PolicyEngine(folder, engine or EngineSection(), device=device) as policy:
        pipeline = Pipeline(policy, templates, section or PredictSection(), canvas)
        trace = pipeline.run([Query(clip, query)])[0]
    masks = masks_of(trace, frames.images, segmenter)
    more = {
        "video": str(video),
        "keyframe_name": frames.names[trace.keyframe],
        "n_frames": len(frames.names),
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
    """Masks, overlay and trace at `out`, in one step. Raises InputError if `out` cannot be made."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        (partial / "masks").mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=out) from error
    try:
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
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
