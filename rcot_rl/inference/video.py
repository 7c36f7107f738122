"""Clips in and out: mp4 through PyAV, folders of frames through OpenCV.

Left out: audio, and videos too long to hold in memory (they are refused with a way out).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_pipelines.corpora.metadata import is_text
from rcot_rl.errors import InputError
from rcot_rl.files import suffix_counts, visible

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
OTHER_IMAGES = (
    ".apng", ".avif", ".bmp", ".dng", ".exr", ".gif", ".heic", ".heif", ".hdr", ".jfif", ".jp2",
    ".jpe", ".jxl", ".pbm", ".pgm", ".pnm", ".ppm", ".svg", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Images that are not read as frames: a folder of frames must not hold any."""
SKIP_CORRUPT = "--skip-corrupt"
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

    missing: int = 0
    """Frames that could not be decoded and were skipped."""


def read_clip(path: Path, every: int = 1, *, skip_corrupt: bool = False) -> Frames:
    """Read a video file or a folder of frames.

    Args:
        path: The video or folder. Hidden files of a folder are ignored.
        every: Take every `every`-th frame.
        skip_corrupt: Leave out frames that cannot be decoded, and count them in `Frames.missing`.
            The other frames keep the names that they have in the whole clip.

    Raises:
        InputError: The path is missing, the folder has no images or images of several types, frames
            differ in size, or something cannot be decoded.
    """
    if path.is_dir():
        return _read_folder(path, every, skip_corrupt)
    if not path.is_file():
        raise InputError("no such video or folder of frames", file=path)
    return _read_video(path, every, skip_corrupt)


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

    # absolute: FFmpeg takes what stands before a colon for a protocol
    with av.open(str(path.absolute()), mode="w", format="mp4") as container:
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


def _read_folder(path: Path, every: int, skip_corrupt: bool) -> Frames:
    files = _frame_files(path)[::every]
    images: np.ndarray | None = None
    names: list[str] = []
    missing = 0
    for file in files:
        try:
            rgb = _image(file)
        except _Undecodable as error:
            if not skip_corrupt:
                raise error.named(file) from error
            missing += 1
            continue
        if images is None:
            _check_size(len(files), rgb, path)
            images = np.empty((len(files), *rgb.shape), np.uint8)
        if rgb.shape != images.shape[1:]:
            raise InputError(_sizes(rgb, images[0]), file=file)
        images[len(names)] = rgb
        names.append(file.stem)
    if images is None:
        raise InputError(f"none of the {missing} frames can be decoded", file=path)
    return Frames(tuple(names), images[: len(names)], Fraction(10), missing)


def _frame_files(path: Path) -> list[Path]:
    """The frames of a folder in natural order. Raises InputError for images of several types."""
    files = [file for file in visible(path.iterdir()) if file.is_file()]
    images = [f for f in files if f.suffix.lower() in (*IMAGE_SUFFIXES, *OTHER_IMAGES)]
    readable = ", ".join(IMAGE_SUFFIXES)
    if not images:
        raise InputError(f"no frames in this folder ({readable})", file=path)
    if len({_TYPES.get(f.suffix.lower(), f.suffix.lower()) for f in images}) > 1:
        raise InputError(
            f"holds images of several types: {suffix_counts(images)}; convert or remove those that "
            "are no frames",
            file=path,
        )
    if images[0].suffix.lower() in OTHER_IMAGES:
        raise InputError(
            f"holds {suffix_counts(images)}, and frames must be {readable}; convert them", file=path
        )
    images.sort(key=lambda f: natural_order(f.name))
    stems: dict[str, str] = {}
    for file in images:
        if stems.setdefault(file.stem, file.name) != file.name:
            raise InputError(f"is the same frame as {stems[file.stem]}; remove one", file=file)
    return images


_TYPES = {".jpeg": ".jpg"}
"""Suffixes that stand for the type of another one."""


class _Undecodable(Exception):
    """A frame that cannot be decoded: why."""

    def named(self, file: Path) -> InputError:
        return InputError(
            f"not a readable image{self}; {SKIP_CORRUPT} continues without it", file=file
        )


def _image(file: Path) -> np.ndarray:
    if not is_text(file.name):
        raise InputError(f"a name that is not in this locale's encoding: {file.name!a}")
    try:
        rgb = cv2.imread(str(file), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        # a header that promises more pixels than OpenCV takes
        raise _Undecodable(f": {' '.join(str(error).split())}") from error
    if rgb is None:
        raise _Undecodable
    return rgb


def _read_video(path: Path, every: int, skip_corrupt: bool) -> Frames:
    import av

    images: list[np.ndarray] = []
    names: list[str] = []
    decoded, faults, opened, index = 0, _Faults(), False, -1
    places = _places(path) if skip_corrupt else {}
    try:
        # a file object: FFmpeg takes names such as `a:b.mp4` and `f%03d.png` for other files
        with path.open("rb") as file, av.open(file) as container:
            if not container.streams.video:
                raise InputError("the file has no video stream", file=path)
            stream = container.streams.video[0]
            rate, opened = stream.average_rate or Fraction(25), True
            if skip_corrupt:
                # with threads per frame, an error hides good frames beside it
                stream.thread_type = "SLICE"
                decoding = _decodable(container, stream, faults)
            else:
                stream.thread_type = "AUTO"
                decoding = container.decode(stream)
            for frame in decoding:
                place = places.get(frame.pts, -1) if places else index + 1
                if place <= index:
                    continue  # damage before it: where it belongs is not known
                decoded, index = decoded + 1, place
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
        after = f" after {decoded} frames" if decoded else ""
        out = f"; {SKIP_CORRUPT} continues with the frames that can" if opened else ""
        raise InputError(f"cannot be decoded{after}: {error.strerror}{out}", file=path) from error
    if not images:
        raise InputError(
            "none of its frames can be decoded" if faults.count else "the video has no frames",
            file=path,
        )
    missing = max(len(places) - decoded, faults.count) if faults.count else 0
    return Frames(tuple(names), _stacked(images), Fraction(rate) / every, missing)


@dataclass
class _Faults:
    """Errors that decoding went on after."""

    count: int = 0


def _places(path: Path) -> dict[int, int]:
    """Presentation time -> index of every frame that the container lists, decodable or not; empty
    if it does not tell times, or cannot be read."""
    import av

    times: set[int | None] = set()
    try:
        with path.open("rb") as file, av.open(file) as container:
            if container.streams.video:
                packets = _packets(container, container.streams.video[0], _Faults())
                times = {packet.pts for packet in packets if not packet.is_discard}
    except av.error.FFmpegError:
        return {}
    known = [time for time in times if time is not None]
    return {} if len(known) < len(times) else {time: k for k, time in enumerate(sorted(known))}


def _packets(container: Any, stream: Any, faults: _Faults) -> Iterator[Any]:
    """The packets of a stream; after an error, those behind it, as long as there are any."""
    import av

    while True:
        read = 0
        try:
            for packet in container.demux(stream):
                if packet.size or packet.dts is not None:  # not the mark of the end
                    read += 1
                    yield packet
            return
        except av.error.FFmpegError:
            faults.count += 1
            if not read:
                return


def _decodable(container: Any, stream: Any, faults: _Faults) -> Iterator[Any]:
    """The frames that can be decoded."""
    import av

    for packet in chain(_packets(container, stream, faults), [None]):
        try:
            frames = stream.decode(packet)
        except av.error.FFmpegError:
            faults.count += 1
            continue
        yield from frames


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
