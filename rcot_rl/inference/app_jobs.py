"""The queries of `rcot app`: their limits, the queue, and what the page shows of them.

One worker thread loads the models, runs one query after another, and ends the models. A query has
a folder below the app's temporary folder, whose name is made here:

JOB/video               the upload, until it is decoded
JOB/frames/<t>.jpg      what was decoded, at most 960 pixels wide and high
JOB/result/             as `rcot segment` writes it; the overlay as pictures and as mp4
JOB/result.zip          the download
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.inference.query_trace import StepTask, TraceStep
from rcot_rl.inference.segment import SegmentModels, write_answer
from rcot_rl.inference.segment_outcome import SegmentOutcome
from rcot_rl.inference.video import DecodedVideo, read_clip, write_video
from rcot_rl.protocol.parser import parse_option, parse_response
from rcot_rl.recipe.inference_section import PredictSection
from rcot_rl.system.disk import KINDS, explained

logger = logging.getLogger(__name__)

_LARGEST = 960
"""Longest side of a shown frame in pixels."""
_SHOWN_CHARS = 20_000
"""Longest text of the model on the page; trace.json has all of it."""

State = Literal["uploading", "waiting", "running", "done", "failed", "cancelled"]
OPEN = ("uploading", "waiting", "running")


@dataclass(frozen=True)
class AppLimits:
    """What one user of the page may ask for."""

    upload_bytes: int = 200 << 20
    frames: int = 600
    shown_frames: int | None = None
    """Frames that the policy is shown; None: all."""
    query_chars: int = 500
    rounds: int = 10
    waiting: int = 4
    """Queries that have not ended, including the running one."""
    kept: int = 6
    """Results on disk; the oldest are removed."""


class QueueFull(Exception):
    """Too many queries have not ended."""


class _Cancelled(Exception):
    pass


@dataclass
class AppJob:
    """One query, from its upload to its result."""

    id: str
    """Random, so that only the page that asked can read the result."""
    query: str
    section: PredictSection
    name: str
    """The video's name on the page; never a path."""
    folder: Path
    clip: Path
    """Video file or folder of frames to read."""
    state: State = "uploading"
    message: str = "uploading the video"
    steps: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    names: tuple[str, ...] = ()
    """Names of the frames, when they are decoded."""
    started: float | None = None
    seconds: float = 0.0
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def elapsed(self) -> float:
        """Seconds since the query started to run, or that it took."""
        running = self.started is not None and self.state == "running"
        return time.monotonic() - (self.started or 0.0) if running else self.seconds


class JobQueue:
    """Runs one query at a time with models that are loaded once."""

    def __init__(self, root: Path, models: SegmentModels, limits: AppLimits) -> None:
        """Load the models.

        Args:
            root: Folder for the queries' files.
            models: Not entered yet.

        Raises:
            InputError: The models cannot be loaded.
        """
        self.root = root
        self.models = models
        self.limits = limits
        self.jobs: dict[str, AppJob] = {}
        """By id, in order of creation."""
        self._lock = threading.Lock()
        # everything about the engine happens in one thread
        self._worker = ThreadPoolExecutor(1, "query")
        self._open = ExitStack()
        try:
            self._worker.submit(self._open.enter_context, models).result()
        except BaseException:
            self._worker.shutdown()
            raise

    def create(self, query: str, section: PredictSection, name: str, clip: Path | None) -> AppJob:
        """Return a new query that waits for its upload.

        Args:
            clip: What to read instead of an upload.

        Raises:
            QueueFull: Too many queries have not ended.
        """
        with self._lock:
            if sum(job.state in OPEN for job in self.jobs.values()) >= self.limits.waiting:
                raise QueueFull
            id = secrets.token_urlsafe(16)
            folder = self.root / id
            folder.mkdir()
            job = AppJob(id, query, section, name, folder, clip or folder / "video")
            self.jobs[id] = job
            return job

    def submit(self, job: AppJob) -> None:
        """Queue a query whose video is complete."""
        job.state, job.message = "waiting", "waiting"
        self._worker.submit(self._run, job)

    def end(self, job: AppJob, state: State, message: str) -> None:
        """End a query, and remove the oldest results, or failures, beyond the limit."""
        if state != "done":
            shutil.rmtree(job.folder, ignore_errors=True)
        with self._lock:
            ended = [other for other in self.jobs.values() if other.state not in OPEN]
            alike = [other for other in ended if (other.state == "done") == (state == "done")]
            for old in alike[: max(0, len(alike) + 1 - self.limits.kept)]:
                del self.jobs[old.id]
                shutil.rmtree(old.folder, ignore_errors=True)
            job.message, job.state = message, state

    def ahead(self, job: AppJob) -> int:
        """Return the number of queries that run before this one."""
        with self._lock:
            before = list(self.jobs.values())[: list(self.jobs).index(job.id)]
        return sum(other.state in ("waiting", "running") for other in before)

    def close(self) -> None:
        """Cancel all queries and stop the engine, after the running step."""
        for job in list(self.jobs.values()):
            job.cancel.set()
        self._worker.submit(self._open.close).result()
        self._worker.shutdown()

    def _run(self, job: AppJob) -> None:
        job.started = time.monotonic()
        job.state = "running"
        try:
            job.result = self._answer(job)
            state: State = "done"
            message = job.result["summary"]
        except _Cancelled:
            state, message = "cancelled", "cancelled"
        except InputError as error:
            state, message = "failed", error_line(error, job)
        except Exception as error:
            logger.exception("a query failed")
            state, message = "failed", f"internal error: {type(error).__name__}; see the terminal"
            if isinstance(error, OSError) and error.errno in KINDS:
                message = f"the result cannot be written: {explained(error, self.root)}"
        job.seconds = time.monotonic() - job.started
        self.end(job, state, message)

    def _answer(self, job: AppJob) -> dict[str, Any]:
        def next_is(message: str) -> None:
            if job.cancel.is_set():
                raise _Cancelled
            job.message = message

        def on_step(number: int, step: TraceStep) -> None:
            job.steps.append(step_view(step))
            next_is(f"thinking: {len(job.steps)} responses so far")

        def on_mask(done: int, total: int) -> None:
            next_is(f"masks: {done} of {total} frames")

        next_is("reading the video")
        frames = read_clip(job.clip, skip_corrupt=True, most_frames=self.limits.frames)
        (job.folder / "video").unlink(missing_ok=True)
        job.names = frames.names
        write_frames(job.folder / "frames", frames)
        next_is("the model watches the video")
        self.models.section = job.section
        (trace,) = self.models.traces(frames, [job.query], key=job.id, on_step=on_step)
        folder = job.folder / "result"
        outcome = write_answer(
            folder,
            folder,
            frames,
            trace,
            self.models,
            video=job.name,
            as_video=False,
            progress=on_mask,
        )
        next_is("writing the overlay")
        overlays = (read_rgb(folder / "overlay" / f"{name}.jpg") for name in frames.names)
        write_video(folder / "overlay.mp4", overlays, frames.rate)
        zip_result(folder, job.folder / "result.zip")
        return result_view(outcome, frames, self.models.segmenter.name)


def error_line(error: InputError, job: AppJob) -> str:
    """Return the error in one line, with the video's name in place of the upload's path."""
    inside = error.file is not None and Path(error.file).is_relative_to(job.folder)
    return (f"{job.name}: {error.message}" if inside else str(error)).splitlines()[0]


_TITLES: dict[StepTask, str] = {
    "vdg": "Description",
    "kfg": "First keyframe",
    "aks": "Judgement",
    "kfg_again": "New keyframe",
    "ktg": "Boxes and points",
}


def step_view(step: TraceStep) -> dict[str, Any]:
    """Return what the page shows of one step.

    `verdict` is A or B for a judgement that has one; `probability` is the model's probability of
    its verdict.
    """
    parsed = parse_response(step.response)
    verdict = parse_option(parsed.answer) if step.task == "aks" else None
    return {
        "task": step.task,
        "title": _TITLES[step.task],
        "frame": step.frame,
        "verdict": verdict,
        "probability": (step.option_probabilities or {}).get(verdict or ""),
        "thought": shortened(parsed.thought),
        "answer": shortened(parsed.answer),
        "response": shortened(step.response),
    }


def shortened(text: str | None) -> str | None:
    """Return the beginning of a long text, marked as such."""
    if text is None or len(text) <= _SHOWN_CHARS:
        return text
    return f"{text[:_SHOWN_CHARS]} … ({len(text) - _SHOWN_CHARS} more characters)"


def result_view(outcome: SegmentOutcome, frames: DecodedVideo, segmenter: str) -> dict[str, Any]:
    """Return what the page shows of a result, as JSON values."""
    trace = outcome.trace
    return {
        "summary": outcome.sentence(),
        "fps": float(frames.rate),
        "missing": frames.missing,
        "shown": None if trace.shown_frames is None else len(trace.shown_frames),
        "shares": [round(share, 5) for share in outcome.shares],
        "segmenter": segmenter,
        "keyframe": trace.keyframe,
        "rounds": trace.rounds,
        "objects": len(trace.boxes_source),
        "description": shortened(trace.description),
        "faults": trace.faults,
    }


def write_frames(folder: Path, frames: DecodedVideo) -> None:
    """Write the decoded frames as JPEG, at most `_LARGEST` pixels wide and high."""
    folder.mkdir()
    for name, image in zip(frames.names, frames.images, strict=True):
        scale = _LARGEST / max(image.shape[:2])
        if scale < 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        encoded, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        if not encoded:
            raise RuntimeError(f"OpenCV could not encode frame {name}")
        (folder / f"{name}.jpg").write_bytes(data.tobytes())


def read_rgb(path: Path) -> np.ndarray:
    """Return an image that this process wrote: uint8 `[H, W, 3]` RGB."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise RuntimeError(f"OpenCV could not read {path}")
    return image


def zip_result(folder: Path, archive: Path) -> None:
    """Write the masks, overlay.mp4, strip.png and trace.json of a result to an archive.

    Stored, because most of them are compressed already.
    """
    names = ("overlay.mp4", "strip.png", "trace.json")
    files = [*sorted(folder.glob("masks/*.png")), *(folder / name for name in names)]
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:
        for file in files:
            out.write(file, file.relative_to(folder).as_posix())
