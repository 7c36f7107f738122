"""Read and write clips: mp4 through PyAV, folders of frames through OpenCV.

Not supported: audio, and videos too long for memory (they are refused with a suggestion).
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

from data_pipelines.corpora.json_node import is_text
from rcot_rl.errors import InputError
from rcot_rl.system.files import suffix_counts, visible

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_OTHER_TYPES = """apng avif bmp dng exr gif heic heif hdr jfif jp2 jpe jxl pbm pgm pnm ppm svg tga
tif tiff webp"""
OTHER_IMAGES = tuple(f".{name}" for name in _OTHER_TYPES.split())
"""Images that are not read as frames: a folder of frames must not contain any."""
SKIP_CORRUPT = "--skip-corrupt"
MOST_FRAMES = 2000
MOST_BYTES = 6 << 30
"""Videos with more decoded frames, or more bytes of them, are refused."""
_ONE_FILE = {"protocol_whitelist": ""}
"""FFmpeg opens nothing but the given file: a playlist could name other files, and URLs."""


@dataclass(frozen=True)
class DecodedVideo:
    """A decoded clip."""

    names: tuple[str, ...]
    """File stems of a folder's frames; five-digit indices of a video's."""
    images: np.ndarray
    """uint8 [T, H, W, 3] RGB."""
    rate: Fraction
    """Frames per second."""
    missing: int = 0
    """Number of frames that could not be decoded and were skipped."""


def read_clip(
    path: Path, *, skip_corrupt: bool = False, most_frames: int = MOST_FRAMES
) -> DecodedVideo:
    """Read a video file or a folder of frames.

    Args:
        path: The video or folder. Hidden files of a folder are ignored.
        skip_corrupt: Leave out frames that cannot be decoded; `DecodedVideo.missing` counts them.
            The other frames keep the names that they have in the whole clip.

    Raises:
        InputError: The path is missing, the folder has no images or images of several types, frames
            differ in size, or a frame cannot be decoded.
    """
    if path.is_dir():
        return _read_folder(path, skip_corrupt, most_frames)
    if not path.is_file():
        raise InputError("no such video or folder of frames", file=path)
    return _read_video(path, skip_corrupt, most_frames)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts `frame10` after `frame9`."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part) if i % 2 else -1, part) for i, part in enumerate(parts)]


def sample_uniform(count: int, n: int) -> tuple[int, ...]:
    """Return `n` of `count` indices, the centres of `n` equal spans; all of them if n >= count."""
    if n >= count:
        return tuple(range(count))
    return tuple((2 * i + 1) * count // (2 * n) for i in range(n))


def write_video(path: Path, images: Iterable[np.ndarray], rate: Fraction) -> None:
    """Write uint8 `[H, W, 3]` RGB frames of one size as H.264; odd sides gain one pixel."""
    import av

    # absolute, because FFmpeg reads the part before a colon as a protocol
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


def _read_folder(path: Path, skip_corrupt: bool, most_frames: int) -> DecodedVideo:
    files = _frame_files(path)
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
            _check_size(len(files), rgb, path, most_frames)
            images = np.empty((len(files), *rgb.shape), np.uint8)
        if rgb.shape != images.shape[1:]:
            raise InputError(_sizes(rgb, images[0]), file=file)
        images[len(names)] = rgb
        names.append(file.stem)
    if images is None:
        raise InputError(f"none of the {missing} frames can be decoded", file=path)
    return DecodedVideo(tuple(names), images[: len(names)], Fraction(10), missing)


def _frame_files(path: Path) -> list[Path]:
    """Return the frames of a folder in natural order. Raises InputError."""
    files = [file for file in visible(path.iterdir()) if file.is_file()]
    images = [f for f in files if f.suffix.lower() in (*IMAGE_SUFFIXES, *OTHER_IMAGES)]
    readable = ", ".join(IMAGE_SUFFIXES)
    if not images:
        raise InputError(f"no frames in this folder ({readable})", file=path)
    if len({_TYPES.get(f.suffix.lower(), f.suffix.lower()) for f in images}) > 1:
        raise InputError(
            f"has images of several types: {suffix_counts(images)}; convert or remove those that "
            "are not frames",
            file=path,
        )
    if images[0].suffix.lower() in OTHER_IMAGES:
        raise InputError(
            f"has {suffix_counts(images)}, and frames must be {readable}; convert them", file=path
        )
    images.sort(key=lambda f: natural_order(f.name))
    stems: dict[str, str] = {}
    for file in images:
        if stems.setdefault(file.stem, file.name) != file.name:
            raise InputError(f"has the same stem as {stems[file.stem]}; remove one", file=file)
    return images


_TYPES = {".jpeg": ".jpg"}
"""Suffixes of the same type as another suffix."""


class _Undecodable(Exception):
    """A frame cannot be decoded; the text is empty or `: reason`."""

    def named(self, file: Path) -> InputError:
        """Return the error about the frame in `file`."""
        return InputError(f"not a readable image{self}; pass {SKIP_CORRUPT} to skip it", file=file)


def _image(file: Path) -> np.ndarray:
    if not is_text(file.name):
        raise InputError(f"the name is not in this locale's encoding: {file.name!a}")
    try:
        rgb = cv2.imread(str(file), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        # a header with more pixels than OpenCV accepts
        raise _Undecodable(f": {' '.join(str(error).split())}") from error
    if rgb is None:
        raise _Undecodable
    return rgb


def _read_video(path: Path, skip_corrupt: bool, most_frames: int) -> DecodedVideo:
    import av

    images: list[np.ndarray] = []
    names: list[str] = []
    decoded, errors, opened, index = 0, _DecodingErrors(), False, -1
    positions = _frame_positions(path) if skip_corrupt else {}
    try:
        # a file object, because FFmpeg reads names such as `a:b.mp4` and `f%03d.png` as others
        with path.open("rb") as file, av.open(file, "r", options=_ONE_FILE) as container:
            if not container.streams.video:
                raise InputError("the file has no video stream", file=path)
            stream = container.streams.video[0]
            rate, opened = stream.average_rate or Fraction(25), True
            if skip_corrupt:
                # with frame threads, an error also hides valid neighbouring frames
                stream.thread_type = "SLICE"
                decoding = _decodable(container, stream, errors)
            else:
                stream.thread_type = "AUTO"
                decoding = container.decode(stream)
            for frame in decoding:
                position = positions.get(frame.pts, -1) if positions else index + 1
                if position <= index:
                    continue  # its position is unknown, because frames before it are damaged
                decoded, index = decoded + 1, position
                # the container's rotation is counter-clockwise, like numpy's
                image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                if images and image.shape != images[0].shape:
                    raise InputError(_sizes(image, images[0]), file=path, key=f"frame {index}")
                images.append(image)
                names.append(f"{index:05d}")
                _check_size(len(images), image, path, most_frames)
    except av.error.FFmpegError as error:
        after = f" after {decoded} frames" if decoded else ""
        advice = f"; pass {SKIP_CORRUPT} to skip the damaged frames" if opened else ""
        message = f"cannot be decoded{after}: {error.strerror}{advice}"
        raise InputError(message, file=path) from error
    if not images:
        raise InputError(
            "none of its frames can be decoded" if errors.count else "the video has no frames",
            file=path,
        )
    missing = max(len(positions) - decoded, errors.count) if errors.count else 0
    return DecodedVideo(tuple(names), _stacked(images), Fraction(rate), missing)


@dataclass
class _DecodingErrors:
    """Number of errors after which decoding continued."""

    count: int = 0


def _frame_positions(path: Path) -> dict[int, int]:
    """Return presentation time -> index of every frame in the container, decodable or not.

    Empty if the container has no times, or cannot be read.
    """
    import av

    times: set[int | None] = set()
    try:
        with path.open("rb") as file, av.open(file, options=_ONE_FILE) as container:
            if container.streams.video:
                packets = _packets(container, container.streams.video[0], _DecodingErrors())
                times = {packet.pts for packet in packets if not packet.is_discard}
    except av.error.FFmpegError:
        return {}
    known = [time for time in times if time is not None]
    return {} if len(known) < len(times) else {time: k for k, time in enumerate(sorted(known))}


def _packets(container: Any, stream: Any, errors: _DecodingErrors) -> Iterator[Any]:
    """Yield the packets of a stream, continuing after errors until no packet follows one."""
    import av

    while True:
        n_read = 0
        try:
            for packet in container.demux(stream):
                if packet.size or packet.dts is not None:  # not the end marker
                    n_read += 1
                    yield packet
            return
        except av.error.FFmpegError:
            errors.count += 1
            if not n_read:
                return


def _decodable(container: Any, stream: Any, errors: _DecodingErrors) -> Iterator[Any]:
    """Yield the frames that can be decoded."""
    import av

    for packet in chain(_packets(container, stream, errors), [None]):
        try:
            frames = stream.decode(packet)
        except av.error.FFmpegError:
            errors.count += 1
            continue
        yield from frames


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    """Return np.stack(images), freeing each image as soon as it is copied."""
    out = np.empty((len(images), *images[0].shape), np.uint8)
    for number in range(len(images)):
        out[number], images[number] = images[number], out[:0]
    return out


def _check_size(count: int, image: np.ndarray, path: Path, most_frames: int) -> None:
    most = min(most_frames, MOST_BYTES // image.nbytes)
    if count > most:
        height, width = image.shape[:2]
        raise InputError(
            f"more than {most} frames of {width} x {height}; cut the video, or extract every k-th "
            "frame into a folder",
            file=path,
        )


def _sizes(image: np.ndarray, first: np.ndarray) -> str:
    (h, w), (h0, w0) = image.shape[:2], first.shape[:2]
    return f"has {h} x {w} pixels, and the first frame {h0} x {w0}"
