"""The archive of predictions that a benchmark's evaluation server scores.

| benchmark                    | path in the archive                                    |
| ---------------------------- | ------------------------------------------------------ |
| ref-youtube-vos, valid, test | Annotations/<video>/<expression_id>/<frame>.png        |
| mevis, valid                 | <video>/<expression_id>/<frame>.png                    |

Sources: MeViS' README ("Submission Guideline") and VRS-HQ's zip script for Ref-YouTube-VOS. Each
mask is 8-bit grey, 0 or 255, of the frame's size; masks that a method saved in another way are
converted. The archive is written beside its target, read back, and then moved into place.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from data_pipelines.corpora import Corpus, CorpusFault, Expression, Video, open_corpus
from data_pipelines.parallel import Progress, ordered_map
from rcot_rl.errors import InputError
from rcot_rl.evaluation.predictions import BROKEN, read_masks
from rcot_rl.prediction_layout import expression_folder
from rcot_rl.segmentation.mask_store import encode_mask
from rcot_rl.system.files import writing
from rcot_rl.system.machine import cpus
from rcot_rl.system.paths import check_path

SERVERS: Mapping[tuple[str, str], str] = {
    ("ref-youtube-vos", "valid"): "Annotations/",
    ("ref-youtube-vos", "test"): "Annotations/",
    ("mevis", "valid"): "",
}
"""(dataset, split) -> folder of the videos in the archive."""

LISTED = 50
"""Most missing or unusable masks that the error lists."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of all files, so that equal predictions give equal bytes."""

_Size = tuple[int, int]


class Submission(NamedTuple):
    """What an archive holds."""

    archive: str
    videos: int
    expressions: int
    masks: int
    size_bytes: int
    empty_masks: int
    """Masks without an object, including the filled ones."""
    filled: list[str]
    """Missing or unusable predictions; their masks are empty."""
    notes: list[str]
    """Unknown names and improper values of the predictions."""


class _Job(NamedTuple):
    video: Video
    expression: Expression
    size: _Size


class _Packed(NamedTuple):
    """The masks of one expression as PNGs, in the order of the frames."""

    pngs: list[bytes]
    empty: int
    faults: list[str]
    notes: list[str]


def write_submission(
    dataset: str,
    corpus_root: Path,
    split: str,
    predictions_dir: Path,
    out: Path,
    *,
    allow_missing: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Submission:
    """Write predictions to a server's archive, and check it by reading it back.

    Args:
        predictions_dir: Holds <video>/<expression_id>/<frame>.png.
        out: The archive, a .zip; an existing one is replaced.
        allow_missing: Submit empty masks where predictions are missing or unusable.
        workers: Processes; None: all CPUs.
        progress: Called with ("pack" or "check", expressions done, total).

    Raises:
        InputError: No server scores this split, a frame of the corpus is missing, or predictions
            are missing or unusable.
    """
    jobs, prefix = _jobs(dataset, corpus_root, split, predictions_dir, out)
    workers = workers or min(cpus(), len(jobs))
    report = progress or (lambda label, done, total: None)
    # forked processes do not survive OpenCV's threads
    cv2.setNumThreads(1)
    temporary = out.with_name(f".{out.name}.tmp")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            result = _pack(jobs, prefix, predictions_dir, temporary, allow_missing, workers, report)
            _check(jobs, prefix, temporary, workers, report)
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    return result._replace(archive=str(out), size_bytes=out.stat().st_size)


def _jobs(
    dataset: str, corpus_root: Path, split: str, predictions_dir: Path, out: Path
) -> tuple[list[_Job], str]:
    corpus = open_corpus(dataset, corpus_root, split)
    if (dataset, split) not in SERVERS:
        known = ", ".join(" ".join(key) for key in SERVERS)
        message = f"no evaluation server scores {dataset} {split} (known: {known}); use rcot eval"
        raise InputError(message, key="--split")
    if out.suffix != ".zip":
        raise InputError("the archive's name must end in .zip", key=str(out))
    check_path(out)
    check_path(predictions_dir)
    if not predictions_dir.is_dir():
        raise InputError("predictions: no such folder", file=predictions_dir)
    jobs = [
        _Job(video, expression, size)
        for video in corpus.videos()
        for size in [_frame_size(corpus, video)]
        for expression in video.expressions
    ]
    if not jobs:
        raise InputError("the corpus has no expressions", file=corpus.expressions_file)
    for video, expression, _ in jobs:
        expression_folder(predictions_dir, video.id, expression.id, allow_hidden=True)
    return jobs, SERVERS[dataset, split]


def _frame_size(corpus: Corpus, video: Video) -> _Size:
    """Return (H, W) of a video's frames; InputError if one is missing or differs."""
    try:
        sizes = [corpus.frame_size(video.id, frame) for frame in video.frames]
    except CorpusFault as fault:
        raise InputError(f"{fault.reason}; masks need its size", file=fault.place) from fault
    if len(set(sizes)) != 1:
        message = f"the video has frames of {len(set(sizes))} sizes; one is needed"
        raise InputError(message, file=corpus.frames_root / video.id)
    return sizes[0]


def _pack(
    jobs: Sequence[_Job],
    prefix: str,
    predictions: Path,
    target: Path,
    allow_missing: bool,
    workers: int,
    report: Progress,
) -> Submission:
    filled: list[str] = []
    notes: list[str] = []
    masks = empty = 0

    def pack(index: int) -> _Packed:
        return _packed(jobs[index], predictions)

    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        packed = ordered_map(pack, range(len(jobs)), workers, chunk=1)
        for number, (job, one) in enumerate(zip(jobs, packed, strict=True), start=1):
            for name, png in zip(_names(job, prefix), one.pngs, strict=True):
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), png)
            filled += one.faults
            notes += one.notes
            masks, empty = masks + len(one.pngs), empty + one.empty
            report("pack", number, len(jobs))
    if filled and not allow_missing:
        more = f" (and {len(filled) - LISTED} more)" if len(filled) > LISTED else ""
        first = InputError(
            f"{len(filled)} predictions are missing or unusable{more}; predict them, or pass "
            "--allow-missing to submit empty masks",
            file=predictions,
        )
        raise InputError.of_all([first, *(InputError(text) for text in filled[:LISTED])])
    videos = len({job.video.id for job in jobs})
    return Submission("", videos, len(jobs), masks, 0, empty, filled, notes)


def _names(job: _Job, prefix: str) -> Iterator[str]:
    """Yield the paths of an expression's masks in the archive."""
    folder = f"{prefix}{job.video.id}/{job.expression.id}"
    return (f"{folder}/{frame}.png" for frame in job.video.frames)


def _packed(job: _Job, predictions: Path) -> _Packed:
    video, expression, size = job
    read = read_masks(predictions, video.id, expression.id, video.frames, size)
    return _Packed(
        [encode_mask(mask) for mask in read.masks_thw],
        sum(not mask.any() for mask in read.masks_thw),
        [f"{place}: missing" for place in read.missing]
        + [f"{fault['place']}: {fault['reason']}" for fault in read.faults],
        [f"{u['place']}: {u['reason']}" for u in read.unexpected],
    )


def _check(jobs: Sequence[_Job], prefix: str, path: Path, workers: int, report: Progress) -> None:
    """Read the archive back; RuntimeError if it is not what the server expects."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    expected = [name for job in jobs for name in _names(job, prefix)]
    if names != expected:
        different = sorted({*names} ^ {*expected})
        raise RuntimeError(f"{path}: {len(different)} unexpected or missing files: {different[:3]}")

    def check(index: int) -> str:
        with zipfile.ZipFile(path) as archive:
            return next(_improper(jobs[index], prefix, archive.read), "")

    checked = ordered_map(check, range(len(jobs)), workers, chunk=8)
    for number, fault in enumerate(checked, start=1):
        if fault:
            raise RuntimeError(f"{path}: {fault}")
        report("check", number, len(jobs))


def _improper(job: _Job, prefix: str, read: Callable[[str], bytes]) -> Iterator[str]:
    """Yield what is wrong with the masks of an expression in the archive."""
    for name in _names(job, prefix):
        try:
            with Image.open(io.BytesIO(read(name)), formats=["PNG"]) as image:
                mode, size, values = (
                    image.mode,
                    (image.height, image.width),
                    np.unique(np.asarray(image)),
                )
        except (*BROKEN, zipfile.BadZipFile) as error:
            yield f"{name} cannot be read ({type(error).__name__})"
            continue
        if (mode, size) != ("L", job.size) or not {0, 255}.issuperset(values.tolist()):
            yield f"{name} has mode {mode}, size {size} and values {values[:5]}"
