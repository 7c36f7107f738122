"""`rcot segment`: masks, overlays and traces of expressions about one video.

OUT/masks/<frame>.png    single channel, 0 or 255, source size: the union of the objects
OUT/overlay.mp4          each object in its colour; for a folder of frames, OUT/overlay/<frame>.jpg
OUT/strip.png            the keyframe and up to three other frames of the overlay
OUT/trace.json           the model's responses, boxes, the outcome and the segmenter's name

Several queries share one engine; query `k` (from 1) is then written to OUT/<k>/.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import cv2
import numpy as np

from data_pipelines.corpora.json_node import is_text
from rcot_rl.errors import InputError
from rcot_rl.inference.engine import PolicyEngine
from rcot_rl.inference.model_folder import (
    SHIPPED,
    PolicyCard,
    check_model,
    find_model,
    read_card,
)
from rcot_rl.inference.overlay import (
    MISSING,
    draw_overlay,
    draw_strip,
    missing_glyphs,
    readable_scale,
)
from rcot_rl.inference.pipeline import VideoReasoner
from rcot_rl.inference.predict import write_masks
from rcot_rl.inference.query_trace import Trace, TraceStep, VideoClip, as_dict
from rcot_rl.inference.segment_outcome import SegmentOutcome, refused_frames, step_text
from rcot_rl.inference.video import DecodedVideo, read_clip, sample_uniform, write_video
from rcot_rl.prediction_layout import TRACE_FILE
from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.recipe.inference_section import EngineSection, PredictSection
from rcot_rl.recipe.schema import CanvasSection
from rcot_rl.segmentation.segmenter import (
    FrameMasks,
    VideoSegmenter,
    check_segmenter,
    load_segmenter,
    union,
)
from rcot_rl.system.disk import explained
from rcot_rl.system.doctor import installed_version
from rcot_rl.system.files import visible
from rcot_rl.system.paths import check_path

STRIP_FRAMES = 4
STRIP_HEIGHT = 256
"""Height of a frame in the strip, in pixels."""

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""Called with (work, done, total)."""


def _silent(*_: object) -> None:
    pass


class SegmentModels:
    """A policy in its engine, prompts, canvases and a segmenter; they serve any number of videos.

    The constructor only checks; entering the context loads, leaving it ends the engine.
    """

    def __init__(
        self,
        model: str = "tiny-trained",
        sam2: str = "tiny",
        *,
        prompts: str | None = None,
        image_canvas: int | None = None,
        video_canvas: int | None = None,
        engine: EngineSection | None = None,
        section: PredictSection | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        """Check the settings. Raises InputError.

        Args:
            model: `tiny-trained`, `tiny`, a Qwen2.5-VL folder or a hub id, which is downloaded.
            sam2: The segmenter, as in `load_segmenter`.
            prompts: Prompt set; default: that of the checkpoint's `rcot.json`, else the paper's.
            image_canvas: Side in pixels; default: that of the checkpoint's `rcot.json`, else the
                paper's.
            video_canvas: As `image_canvas`.
        """
        _check_device(device)
        check_segmenter(sam2)  # before a policy is downloaded
        self.model, self.sam2, self.device = model, sam2, device
        self.folder = find_model(model)
        check_model(self.folder)
        card = read_card(self.folder) or PolicyCard()
        self.prompts = load_prompts(prompts or card.prompts)
        self.canvas = _canvas(image_canvas or card.image_canvas, video_canvas or card.video_canvas)
        self.section = section or PredictSection()
        self.engine = engine or EngineSection()
        self.policy: PolicyEngine
        self.segmenter: VideoSegmenter
        self._open = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._load()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open.close()

    def _load(self) -> None:
        if self.device == "cpu" and self.model in SHIPPED:
            self._open.enter_context(_one_thread())
        self.segmenter = load_segmenter(self.sam2, self.device)
        # one event loop for all videos: the engine belongs to the loop in which it starts
        self._loop = self._open.enter_context(asyncio.Runner())
        self._loop.run(self._start())

    async def _start(self) -> None:
        self.policy = PolicyEngine(self.folder, self.engine, device=self.device)
        self._open.callback(lambda: self._loop.run(self._stop()))

    async def _stop(self) -> None:
        self.policy.close()

    def traces(
        self,
        frames: DecodedVideo,
        queries: Sequence[str],
        *,
        key: str,
        every: int = 1,
        on_step: Callable[[int, TraceStep], None] = _silent,
    ) -> list[Trace]:
        """Reason about every `every`-th frame of a video; one trace per query. Raises InputError.

        Args:
            key: Identifies the video; seeds of samples depend on it.
            on_step: Called after each step with the query's index.

        Returns:
            Traces whose frames are indices into `frames`.
        """
        shown = range(0, len(frames.names), every)
        clip = VideoClip(key, len(shown), lambda i: frames.images[shown[i]])

        async def reason() -> list[Trace]:
            reasoner = VideoReasoner(clip, self.policy, self.prompts, self.canvas)

            async def answer(number: int, query: str) -> Trace:
                def report(step: TraceStep) -> None:
                    on_step(number, in_whole_clip(step, shown))

                return await reasoner.trace(query, self.section, report)

            return await asyncio.gather(*(answer(i, query) for i, query in enumerate(queries)))

        return [trace_in_whole_clip(trace, shown) for trace in self._loop.run(reason())]

    def masks(self, frames: DecodedVideo, trace: Trace) -> Iterator[FrameMasks]:
        """Yield (frame, bool `[N, H, W]`) of a trace's N objects (eq. 6), every frame once."""
        boxes = np.reshape(trace.boxes_source, (-1, 4))
        points = np.reshape(trace.points_source, (-1, 2))
        return self.segmenter.segment(frames.images, trace.keyframe, boxes, points)


def segment(
    video: Path,
    queries: Sequence[str],
    out: Path,
    models: SegmentModels,
    *,
    every: int = 1,
    skip_corrupt: bool = False,
    say: Say = _silent,
    progress: Progress = _silent,
) -> list[SegmentOutcome]:
    """Segment the objects that expressions describe in a video, and write the results.

    Inputs are checked before anything is loaded. `out` is written in one step. Raises InputError.

    Args:
        video: A video file, or a folder of frames.
        queries: At least one expression.
        out: Folder of the results; must be missing or empty.
        models: What to load; not entered yet.
        every: Show the policy every `every`-th frame. Masks are made for all frames.
        skip_corrupt: Skip frames that cannot be decoded. Their number is in the trace
            (`missing_frames`) and reported.
        say: Gets one line per step.
        progress: Gets the progress of the propagation.
    """
    _check_texts(video, queries)
    if every < 1:
        raise InputError("must be at least 1", key="every")
    check_path(video)
    out = check_new_folder(out)
    frames = read_clip(video, skip_corrupt=skip_corrupt)
    if frames.missing:
        say(f"{video}: skipped {frames.missing} frames that cannot be decoded")
    lacking = missing_glyphs("".join(queries))
    if lacking:
        characters = lacking if lacking.isprintable() else ascii(lacking)
        say(f"the overlay's font lacks {characters}; they are drawn as {MISSING}")
    height, width = frames.images.shape[1:3]
    say(f"{video}: {len(frames.names)} frames of {width} x {height}")
    if models.model in SHIPPED:
        say(f"policy {models.model} knows drawn shapes only; name another with --model")
    say(f"loading policy {models.model} and segmenter {models.sam2} on {models.device}")
    started = time.monotonic()
    with models, published(out) as folder:
        say(f"loaded in {time.monotonic() - started:.0f} s")

        def on_step(number: int, step: TraceStep) -> None:
            if step.task == "vdg":
                if number == 0:  # a video is described once
                    say(step_text(step))
            else:
                say(f"{_prefix(number, queries)}{step_text(step)}")

        traces = models.traces(frames, queries, key=str(video), every=every, on_step=on_step)
        if traces[0].shown_frames is not None:
            say(f"the policy saw {len(traces[0].shown_frames)} of {len(frames.names)} frames")
        outcomes = []
        for number, trace in enumerate(traces):
            name = str(number + 1) if len(queries) > 1 else ""
            work = f"{_prefix(number, queries)}masks"
            outcome = write_answer(
                folder / name,
                out / name,
                frames,
                trace,
                models,
                video=str(video),
                as_video=video.is_file(),
                progress=partial(progress, work),
            )
            outcomes.append(outcome)
    return outcomes


def check_new_folder(out: Path) -> Path:
    """Return the resolved path of a folder that is missing or empty. Raises InputError."""
    check_path(out)
    out = out.resolve()
    if out.exists() and (not out.is_dir() or visible(out.iterdir())):
        raise InputError("exists and is not empty; choose another folder", file=out)
    _partial(out).rmdir()  # report an unwritable folder before anything is loaded
    return out


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """Give a temporary folder whose content appears in `out`, a resolved path, in one step.

    An existing `out` is filled, the trace last. After an error, nothing appears. Raises InputError.
    """
    temporary = _partial(out)
    try:
        yield temporary
        if temporary.parent == out:
            for entry in sorted(temporary.iterdir(), key=lambda e: e.name == TRACE_FILE):
                os.replace(entry, out / entry.name)
        else:
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_answer(
    folder: Path,
    out: Path,
    frames: DecodedVideo,
    trace: Trace,
    models: SegmentModels,
    *,
    video: str,
    as_video: bool,
    progress: Callable[[int, int], None] = _silent,
) -> SegmentOutcome:
    """Make the masks of a trace, and write them, the overlay, the strip and trace.json.

    Args:
        out: Where the content of `folder` will be.
        video: The video's name in trace.json.
        as_video: Write the overlay as mp4, else as one JPEG per frame.
        progress: Called with (done, total) after each frame.
    """
    masks = models.masks(frames, trace)
    shares = write_query(folder, frames, trace, masks, as_video=as_video, progress=progress)
    outcome = SegmentOutcome(trace, out, frames.names, shares, as_video)
    more = _more(video, frames, models) | outcome.as_dict()
    text = json.dumps(as_dict(trace, **more), ensure_ascii=False, indent=1)
    (folder / TRACE_FILE).write_text(text + "\n", encoding="utf-8")
    return outcome


def write_query(
    folder: Path,
    frames: DecodedVideo,
    trace: Trace,
    masks: Iterable[FrameMasks],
    *,
    as_video: bool,
    progress: Callable[[int, int], None] = _silent,
) -> list[float]:
    """Write masks, overlay and strip of one query; return the masked share of each frame.

    Args:
        masks: (frame, bool `[N, H, W]`), every frame once, in any order.
        as_video: Write the overlay as mp4, else as one JPEG per frame.
        progress: Called with (done, total) after each frame.
    """
    folder.mkdir(exist_ok=True)
    (folder / "masks").mkdir()
    n_frames, size = len(frames.names), frames.images.shape[1:3]
    shares = [0.0] * n_frames
    packed: dict[int, np.ndarray] = {}  # bits, because the overlay needs the frames in order

    def unions() -> Iterator[tuple[int, np.ndarray]]:
        for done, (t, masks_nhw) in enumerate(masks, start=1):
            merged = union(masks_nhw)
            shares[t] = float(merged.mean())
            packed[t] = np.packbits(masks_nhw.reshape(len(masks_nhw), merged.size), axis=1)
            yield t, merged
            progress(done, n_frames)

    write_masks(folder / "masks", frames.names, unions())

    def masks_at(t: int) -> np.ndarray:
        bits = np.unpackbits(packed[t], axis=1, count=size[0] * size[1])
        return bits.reshape(len(bits), *size).astype(bool)

    def drawn(t: int, **how: Any) -> np.ndarray:
        is_key = t == trace.keyframe
        boxes, points = (trace.boxes_source, trace.points_source) if is_key else ((), ())
        return draw_overlay(frames.images[t], masks_at(t), boxes, points, keyframe=is_key, **how)

    scale = readable_scale(*size)
    labels = {trace.keyframe: "keyframe"}
    overlays = (
        drawn(t, label=labels.get(t, ""), query=trace.query, scale=scale) for t in range(n_frames)
    )
    if as_video:
        write_video(folder / "overlay.mp4", overlays, frames.rate)
    else:
        (folder / "overlay").mkdir()
        for name, image in zip(frames.names, overlays, strict=True):
            _write_image(folder / "overlay" / f"{name}.jpg", image)
    refused = refused_frames(trace)
    labels = dict.fromkeys(refused, ": refused") | {trace.keyframe: ": keyframe"}
    panels = [
        drawn(t, label=f"frame {t}{labels.get(t, '')}", scale=STRIP_HEIGHT / size[0])
        for t in strip_frames(n_frames, trace.keyframe, refused)
    ]
    _write_image(folder / "strip.png", draw_strip(panels, f"query: {trace.query}"))
    return shares


def strip_frames(n_frames: int, keyframe: int, refused: Sequence[int]) -> list[int]:
    """Return up to `STRIP_FRAMES` frames, in order: keyframe, refused frames, an even spread."""
    chosen = list(dict.fromkeys((keyframe, *refused)))[:STRIP_FRAMES]
    others = [t for t in range(n_frames) if t not in chosen]
    spread = sample_uniform(len(others), STRIP_FRAMES - len(chosen))
    return sorted(chosen + [others[i] for i in spread])


def _write_image(file: Path, rgb: np.ndarray) -> None:
    if not cv2.imwrite(str(file), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)):
        raise RuntimeError(f"OpenCV could not write {file}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread, here and in the engine's process, unless the user set a number.

    A million parameters gain nothing from more: on shared cores, threads that wait for one another
    took 50 s of CPU time instead of 23 s.
    """
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        torch.set_num_threads(threads)


def in_whole_clip(step: TraceStep, shown: range) -> TraceStep:
    """Return a step about the frames `shown` with indices into the whole clip."""
    if step.frame is not None:
        return replace(step, frame=shown[step.frame])
    return replace(step, frames=_thinned(step.frames, shown))


def trace_in_whole_clip(trace: Trace, shown: range) -> Trace:
    """Return a trace about the frames `shown` with indices into the whole clip."""
    saw_video = any(step.frame is None for step in trace.steps)
    return replace(
        trace,
        keyframe=shown[trace.keyframe],
        initial_keyframe=shown[trace.initial_keyframe],
        shown_frames=_thinned(trace.shown_frames, shown) if saw_video else None,
        steps=[in_whole_clip(step, shown) for step in trace.steps],
    )


def _thinned(frames: list[int] | None, shown: range) -> list[int] | None:
    """Return positions in `shown` as frames of the clip; None: all frames of the clip."""
    if frames is None:
        return None if shown.step == 1 else list(shown)
    return [shown[i] for i in frames]


def _prefix(number: int, queries: Sequence[str]) -> str:
    return f"query {number + 1}: " if len(queries) > 1 else ""


def _more(video: str, frames: DecodedVideo, models: SegmentModels) -> dict[str, Any]:
    return {
        "video": video,
        "n_frames": len(frames.names),
        "missing_frames": frames.missing,
        "source_size": list(frames.images.shape[1:3]),
        "model": models.model,
        "prompts": models.prompts.name,
        "canvas": models.canvas.model_dump(),
        "segmenter": models.segmenter.name,
    }


def _check_texts(video: Path, queries: Sequence[str]) -> None:
    if not queries:
        raise InputError("there is no query")
    for query in queries:
        if not query.strip():
            raise InputError("the query is empty")
        if not is_text(query):
            raise InputError(f"the query is not in this locale's encoding: {query!a}")
    if not is_text(str(video)):
        raise InputError(f"the video's name is not in this locale's encoding: {str(video)!a}")


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


def _canvas(image: int, video: int) -> CanvasSection:
    for key, side in (("image-canvas", image), ("video-canvas", video)):
        if side < 28 or side % 28:
            raise InputError(f"must be a multiple of 28 pixels (is {side})", key=key)
    return CanvasSection(image=image, video=video)
