"""Clips in and out: mp4 through PyAV, folders of frames through OpenCV.

Left out: audio, and videos too long to hold in memory (they are refused with a way out).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from data_pipelines.corpora.metadata import is_text
from rcot_rl.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MOST_FRAMES = 2000
MOST_BYTES = 6 << 30
"""More decoded frames than this, or more bytes of them, are refused."""


@dataclass(frozen=True)
class Frames:
    """A decoded clip."""

    names: tuple[str, ...]
    """File stems of a folder's frames; five-digit indices of a video's."""

    images: np.ndarray
    """uint8 [T, H, W, 3] RGB."""

    rate: Fraction
    """Frames a second."""


def read_clip(path: Path, every: int = 1) -> Frames:
    """The video file or folder of frames at `path`, every `every`-th frame of it.

    Raises InputError for a missing path, a folder without images, frames of different sizes, and
    what cannot be decoded.
    """
    if path.is_dir():
        return _read_folder(path, every)
    if not path.is_file():
        raise InputError("no such video or folder of frames", file=path)
    return _read_video(path, every)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts `frame10` after `frame9`."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part) if i % 2 else -1, part) for i, part in enumerate(parts)]


def sample_uniform(count: int, n: int) -> tuple[int, ...]:
    """`n` of `count` indices, the centres of `n` equal stretches; all of them if n >= count."""
    if n >= count:
        return tuple(range(count))
    return tuple((2 * i + 1) * count // (2 * n) for i in range(n))


def write_video(path: Path, images: Iterable[np.ndarray], rate: Fraction) -> None:
    """Write uint8 [H, W, 3] RGB frames of one size as H.264; odd sides gain a repeated row."""
    import av

    with av.open(str(path), mode="w", format="mp4") as container:
        stream = None
        for image in images:
            even = np.pad(image, [(0, side % 2) for side in image.shape[:2]] + [(0, 0)], "edge")
            if stream is None:
                stream = container.add_stream("libx264", rate=rate)
                stream.height, stream.width = even.shape[:2]
                stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())


def _read_folder(path: Path, every: int) -> Frames:
    files = [f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()]
    files = sorted(files, key=lambda f: natural_order(f.name))[::every]
    if not files:
        raise InputError(f"no frames in this folder ({', '.join(IMAGE_SUFFIXES)})", file=path)
    images: np.ndarray | None = None
    names: list[str] = []
    for number, file in enumerate(files):
        rgb = _image(file)
        if images is None:
            _check_size(len(files), rgb, path)
            images = np.empty((len(files), *rgb.shape), np.uint8)
        if rgb.shape != images.shape[1:]:
            raise InputError(_sizes(rgb, images[0]), file=file)
        if file.stem in names:
            raise InputError("two frames of this name, of different types", file=file)
        names.append(file.stem)
        images[number] = rgb
    assert images is not None  # there are files
    return Frames(tuple(names), images, Fraction(10))


def _image(file: Path) -> np.ndarray:
    if not is_text(file.name):
        raise InputError(f"a name that is not in this locale's encoding: {file.name!a}")
    try:
        rgb = cv2.imread(str(file), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        # a header that promises more pixels than OpenCV takes
        raise InputError(f"not a readable image: {error}".strip(), file=file) from error
    if rgb is None:
        raise InputError("not a readable image", file=file)
    return rgb


def _read_video(path: Path, every: int) -> Frames:
    import av

    images: list[np.ndarray] = []
    names: list[str] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError("the file has no video stream", file=path)
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate or Fraction(25)
            for index, frame in enumerate(container.decode(stream)):
                if index % every:
                    continue
                # the container's rotation is counter-clockwise, as numpy's
                image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                if images and image.shape != images[0].shape:
                    raise InputError(_sizes(image, images[0]), file=path, key=f"frame {index}")
                images.append(image)
                names.append(f"{index:05d}")
                _check_size(len(images), image, path)
    except av.error.FFmpegError as error:
        after = f" after {len(images)} frames" if images else ""
        raise InputError(f"cannot be decoded{after}: {error.strerror}", file=path) from error
    if not images:
        raise InputError("the video has no frames", file=path)
    return Frames(tuple(names), _stacked(images), Fraction(rate) / every)


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    """np.stack, which gives each image free as soon as it is copied."""
    out = np.empty((len(images), *images[0].shape), np.uint8)
    for number in range(len(images)):
        out[number], images[number] = images[number], out[:0]
    return out


def _check_size(count: int, image: np.ndarray, path: Path) -> None:
    most = min(MOST_FRAMES, MOST_BYTES // image.nbytes)
    if count > most:
        height, width = image.shape[:2]
        raise InputError(
            f"more than {most} frames of {width} x {height}; take every k-th (--every)", file=path
        )


def _sizes(image: np.ndarray, first: np.ndarray) -> str:
    (h, w), (h0, w0) = image.shape[:2], first.shape[:2]
    return f"{h} x {w} pixels, the first frame has {h0} x {w0}"
