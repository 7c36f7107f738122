"""`rcot segment`: masks, an overlay and the trace of one expression about one video.

OUT/masks/<frame>.png    single channel, 0 or 255, source size
OUT/overlay.mp4          the masks on the video; for a folder of frames, OUT/overlay/<frame>.jpg
OUT/trace.json           the model's responses, boxes, and the segmenter's name
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from data_pipelines.corpora.json_node import is_text
from rcot_rl.errors import InputError
from rcot_rl.inference.engine import PolicyEngine
from rcot_rl.inference.model_folder import PolicyCard, check_model, find_model, read_card
from rcot_rl.inference.overlay import draw_overlay
from rcot_rl.inference.pipeline import Pipeline
from rcot_rl.inference.predict import masks_of, write_masks
from rcot_rl.inference.prompting import Prompter
from rcot_rl.inference.query_trace import Trace, VideoClip, VideoQuery, as_dict
from rcot_rl.inference.video import DecodedVideo, read_clip, write_video
from rcot_rl.prediction_layout import TRACE_FILE
from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.recipe.inference_section import EngineSection, PredictSection
from rcot_rl.recipe.schema import CanvasSection
from rcot_rl.segmentation.segmenter import check_segmenter, load_segmenter
from rcot_rl.system.disk import explained
from rcot_rl.system.doctor import installed_version
from rcot_rl.system.files import visible
from rcot_rl.system.paths import check_path


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
    """Segment the objects that an expression describes in a video, and write the results.

    Inputs are checked before anything is downloaded or loaded. `out` is written in one step.
    Raises InputError.

    Args:
        video: A video file, or a folder of frames.
        out: Folder of the results; must be missing or empty.
        model: `tiny`, a Qwen2.5-VL folder or a hub id.
        sam2: The segmenter, as in `load_segmenter`.
        prompts: Prompt set; default: that of the checkpoint's `rcot.json`, else the paper's.
        skip_corrupt: Skip frames that cannot be decoded. Their number is in the trace
            (`missing_frames`) and passed to `announce`.
    """
    if not query.strip():
        raise InputError("the query is empty")
    for text, source in ((query, "the query"), (str(video), "the video's name")):
        if not is_text(text):
            raise InputError(f"{source} is not in this locale's encoding: {text!a}")
    _check_device(device)
    check_segmenter(sam2)  # before a policy is downloaded or loaded
    if every < 1:
        raise InputError("must be at least 1", key="every")
    check_path(video)
    check_path(out)
    out = out.resolve()
    if out.exists() and (not out.is_dir() or visible(out.iterdir())):
        raise InputError("exists and is not empty; choose another folder", file=out)
    _partial(out).rmdir()  # report an unwritable folder before anything is loaded
    folder = find_model(model)
    check_model(folder)
    card = read_card(folder) or PolicyCard()
    templates = load_prompts(prompts or card.prompts)
    canvas = _canvas(image_canvas or card.image_canvas, video_canvas or card.video_canvas)
    frames = read_clip(video, every, skip_corrupt=skip_corrupt)
    if frames.missing and announce is not None:
        announce(f"{video}: skipped {frames.missing} frames that cannot be decoded")
    section = section or PredictSection()
    engine = engine or EngineSection()
    _check_length(folder, engine, section, len(frames.names), canvas, every)
    segmenter = load_segmenter(sam2, device)
    clip = VideoClip(str(video), len(frames.names), frames.images.__getitem__)
    with PolicyEngine(folder, engine, device=device) as policy:
        pipeline = Pipeline(policy, templates, section, canvas)
        trace = pipeline.run([VideoQuery(clip, query)])[0]
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
    out: Path, frames: DecodedVideo, masks_thw: np.ndarray, trace: dict[str, Any], *, as_video: bool
) -> None:
    """Write masks, overlay and trace to `out` in one step; into an existing folder, the trace last.

    Raises InputError.

    Args:
        masks_thw: bool `[T, H, W]`.
        as_video: Write the overlay as mp4, else as one JPEG per frame.
    """
    partial = _partial(out)
    try:
        (partial / "masks").mkdir()
        write_masks(partial / "masks", frames.names, masks_thw)
        overlays = (_overlay(frames, masks_thw, trace, t) for t in range(len(frames.names)))
        if as_video:
            write_video(partial / "overlay.mp4", overlays, frames.rate)
        else:
            (partial / "overlay").mkdir()
            for name, image in zip(frames.names, overlays, strict=True):
                file = str(partial / "overlay" / f"{name}.jpg")
                if not cv2.imwrite(file, cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
                    raise RuntimeError(f"OpenCV could not write {file}")
        text = json.dumps(trace, ensure_ascii=False, indent=1)
        (partial / TRACE_FILE).write_text(text + "\n", encoding="utf-8")
        if partial.parent == out:
            for entry in sorted(partial.iterdir(), key=lambda e: e.name == TRACE_FILE):
                os.replace(entry, out / entry.name)
        else:
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(out: Path) -> Path:
    """Create the temporary folder of the results of `out`, a resolved path.

    It is inside `out` if that exists, because `out` may be a mount. Raises InputError.
    """
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
        raise InputError("torch sees no usable GPU; use --device cpu", key="--device")
    if installed_version("vllm") is None:
        raise InputError(
            "vLLM for GPUs is not installed; install it or use --device cpu", key="--device"
        )


def _check_length(
    folder: Path,
    engine: EngineSection,
    section: PredictSection,
    n_frames: int,
    canvas: CanvasSection,
    every: int,
) -> None:
    """Check that the model accepts so many frames. Raises InputError."""
    if not (section.vdg or section.kfg or section.rounds):
        return
    shown = min(n for n in (section.max_frames, n_frames) if n)
    prompter = Prompter(folder, engine.max_model_len)
    tokens = prompter.media_tokens("video", (canvas.video, canvas.video), shown)
    if tokens >= prompter.max_model_len:
        stride = every * -(-11 * tokens // (10 * prompter.max_model_len))
        raise InputError(
            f"{n_frames} frames make {tokens} tokens, and the limit is "
            f"{prompter.max_model_len}; take every {stride}th frame",
            key="--every",
        )


def _overlay(
    frames: DecodedVideo, masks_thw: np.ndarray, trace: dict[str, Any], t: int
) -> np.ndarray:
    is_keyframe = t == trace["keyframe"]
    boxes = trace["boxes_source"] if is_keyframe else []
    points = trace["points_source"] if is_keyframe else []
    return draw_overlay(frames.images[t], masks_thw[t], boxes, points)


def _canvas(image: int, video: int) -> CanvasSection:
    for key, side in (("image-canvas", image), ("video-canvas", video)):
        if side < 28 or side % 28:
            raise InputError(f"must be a multiple of 28 pixels (is {side})", key=key)
    return CanvasSection(image=image, video=video)
