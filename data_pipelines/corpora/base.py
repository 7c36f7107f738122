"""What every corpus offers: videos, frames, expressions, and objects' masks on demand.

Metadata is read at once, images and masks lazily. `CorpusFault` is a defect of the data (a missing
JPEG, a mask that does not fit its frame): the builder quarantines what it touches and reports it.
A missing or malformed metadata file is an InputError; so is a broken entry in one, for a video or
an expression, where the corpus is opened `strict`. Where it is not, `Corpus.faults` lists it.
"""

from __future__ import annotations

import abc
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeVar

import cv2
import numpy as np

from data_pipelines.corpora.metadata import Node
from data_pipelines.geometry import tight_box
from data_pipelines.planning.jpeg import JpegFault, size_of
from rcot_rl.errors import InputError

_T = TypeVar("_T")


class CorpusFault(Exception):
    """A defect of the corpus at a known place; reason is a machine-readable code."""

    def __init__(self, reason: str, place: str, detail: str = "") -> None:
        self.reason = reason
        self.place = place
        self.detail = detail
        # All arguments, so that the exception survives the way back from a worker process.
        super().__init__(reason, place, detail)

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def id_order(identifier: str) -> tuple[int, int, str, str]:
    """Sort key: integers by value, then other strings."""
    if identifier.isascii() and identifier.isdigit():
        # by length and text: Python refuses to make a number of very many digits
        digits = identifier.lstrip("0")
        return (0, len(digits), digits, identifier)
    return (1, 0, "", identifier)


@dataclass(frozen=True)
class Expression:
    """One sentence about one video."""

    id: str
    text: str
    object_ids: tuple[str, ...]
    """The targets, ascending; empty: the target is not in the video, or is not published."""
    anno_ids: tuple[str, ...] = ()
    """What `object_mask` takes for each of `object_ids`; the same ids where masks are PNGs."""
    type_id: int | None = None
    """ReVOS: 0 referring, 1 reasoning, 2 no target."""
    unlabelled: bool = False
    """True if the corpus has labels but does not say which objects this sentence describes."""


@dataclass(frozen=True)
class Video:
    """One clip. `frames` are the stems of its JPEGs in time order; ids may hold slashes."""

    id: str
    frames: tuple[str, ...]
    expressions: tuple[Expression, ...]


@dataclass(frozen=True)
class BadEntry:
    """An entry of the metadata that cannot be read: a video's, or one of its expressions'."""

    video: str
    expression_id: str
    """Empty: the whole video's."""
    fault: CorpusFault


def pair_ids(objects: list[str], annos: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(object ids ascending, their annotation ids), each pair once."""
    pairs = sorted(set(zip(objects, annos, strict=True)), key=lambda p: (id_order(p[0]), p[1]))
    return tuple(o for o, _ in pairs), tuple(a for _, a in pairs)


def _length(path: str) -> int:
    """Bytes of a file; -1: it is not there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _missing_frame(path: str) -> CorpusFault:
    """The fault of a frame without its JPEG; names the file that is there in another format."""
    folder, name = os.path.split(path)
    stem = name.removesuffix(".jpg")
    try:
        beside = sorted(n for n in os.listdir(folder) if n.startswith(f"{stem}."))
    except OSError:
        beside = []
    detail = f"there is {beside[0]}; frames must be .jpg" if beside else ""
    return CorpusFault("missing_frame", path, detail)


class Corpus(abc.ABC):
    """A split of a corpus on disk. Masks are bool [H, W], frames uint8 [H, W, 3] RGB, both in
    the source's resolution."""

    dataset: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    """Names that `open_corpus` takes."""

    def __init__(self, root: Path, split: str, strict: bool = True) -> None:
        self.root = root
        self.split = split
        self.strict = strict
        self.faults: list[BadEntry] = []
        """What `videos` left out, when not strict."""
        self._videos: list[Video] | None = None

    @property
    @abc.abstractmethod
    def expressions_file(self) -> Path:
        """The JSON file with videos and expressions."""

    @property
    @abc.abstractmethod
    def frames_root(self) -> Path:
        """The JPEGImages folder."""

    @property
    @abc.abstractmethod
    def has_masks(self) -> bool:
        """Whether this split is published with masks."""

    disjoint: ClassVar[bool] = False
    """Objects of a frame share no pixel, since they are written into one image."""

    def label_bytes(self, video: Video) -> Iterator[bytes]:
        """What is known of a video's masks, or a digest of it, in a fixed order. Readers take the
        bytes of their files instead, which is faster."""
        for anno_id in sorted({a for e in video.expressions for a in e.anno_ids}):
            for index in range(len(video.frames)):
                try:
                    mask = self.object_mask(video.id, anno_id, index)
                except CorpusFault as fault:
                    yield str(fault).encode()
                else:
                    yield b"" if mask is None else repr(mask.shape).encode() + mask.tobytes()

    def digest(self, video: Video) -> str:
        """Changes when a video's sentences, masks, or frames change; a frame only as far as the
        length of its file tells."""
        said = [(e.id, e.text, e.object_ids, e.anno_ids, e.type_id) for e in video.expressions]
        sizes = [_length(self._frame_file(video.id, frame)) for frame in video.frames]
        text = json.dumps([video.id, video.frames, said, sizes], separators=(",", ":"))
        found = hashlib.sha256(text.encode())
        for part in self.label_bytes(video):
            found.update(part)
        return found.hexdigest()

    @abc.abstractmethod
    def _read_videos(self) -> list[Video]: ...

    @abc.abstractmethod
    def object_mask(self, video_id: str, anno_id: str, frame_index: int) -> np.ndarray | None:
        """bool [H, W] of one object in one frame; None where the corpus says it is not there.

        anno_id: one of `Expression.anno_ids`. Raises CorpusFault.
        """

    def annotation_fault(self, video: Video, anno_id: str) -> CorpusFault | None:
        """Return why an annotation as a whole does not fit its video, or None if it does.

        Readers whose masks are one image a frame have nothing to check here.
        """
        return None

    def published_mask(self, video: Video, anno_id: str, frame_index: int) -> np.ndarray | None:
        """Read one object's mask as the public evaluation scripts do.

        Unlike `object_mask` this does not ask whether the annotation as a whole fits the video.

        Returns:
            bool [H, W], or None if the corpus says that the object is not in the frame.

        Raises:
            CorpusFault: The mask is missing or cannot be decoded.
        """
        return self.object_mask(video.id, anno_id, frame_index)

    def videos(self) -> list[Video]:
        """All videos with their expressions, in the file's order; metadata only."""
        if self._videos is None:
            self._videos = self._read_videos()
            self._by_id = {v.id: v for v in self._videos}
        return self._videos

    def keep(
        self, nodes: Iterable[tuple[str, Node]], read: Callable[[str, Node], _T], video: str = ""
    ) -> list[_T]:
        """`read` of every entry; strict: the first broken one is an InputError, else broken ones
        are noted in `faults` and left out. video: the one whose expressions these are."""
        out = []
        for name, node in nodes:
            try:
                out.append(read(name, node))
            except InputError as error:
                if self.strict:
                    raise
                place = ": ".join(p for p in (error.file, error.key) if p)
                fault = CorpusFault("bad_metadata", place, error.message)
                self.faults.append(BadEntry(video or name, name if video else "", fault))
        return out

    def read_expressions(
        self, video: str, nodes: Iterable[tuple[str, Node]], read: Callable[[str, Node], Expression]
    ) -> tuple[Expression, ...]:
        """Those that can be used; see `keep`. A builder refuses sentences that say nothing, and
        objects that are not one mask a frame."""

        seen: set[str] = set()

        def checked(name: str, node: Node) -> Expression:
            expression = read(name, node)
            if self.strict:
                return expression
            if expression.id in seen:
                node.refuse(f"a second expression with the id {expression.id}")
            seen.add(expression.id)
            if not expression.text.strip():
                node.refuse("an expression without words")
            for ids, what in (
                (expression.object_ids, "an object with several annotations"),
                (expression.anno_ids, "an annotation of several objects"),
            ):
                if len(set(ids)) < len(ids):
                    node.refuse(what)
            return expression

        return tuple(self.keep(nodes, checked, video))

    def read_frames(self, node: Node) -> tuple[str, ...]:
        """The frames of a video, in time order. Raises InputError."""
        frames = tuple(f.path_part() for f in node.elements())
        if not self.strict:
            if not frames:
                node.refuse("no frames")
            if len(set(frames)) < len(frames):
                node.refuse("a frame is listed twice")
        return frames

    def video(self, video_id: str) -> Video:
        """One video by id; KeyError when there is none."""
        self.videos()
        return self._by_id[video_id]

    def expression(self, video: Video, expression_id: str) -> Expression:
        """One of a video's, or `VIDEO#ID`: that of another video, of which nothing is here (see
        `data_pipelines.planning.absent`). KeyError when there is none."""
        for e in video.expressions:
            if e.id == expression_id:
                return e
        for at in (k for k, character in enumerate(expression_id) if character == "#"):
            donor, name = expression_id[:at], expression_id[at + 1 :]
            for e in self._by_id[donor].expressions if donor in self._by_id else ():
                if e.id == name:
                    return Expression(expression_id, e.text, ())
        raise KeyError(expression_id)

    def load(self) -> None:
        """Reads now what would be read at first use, so that forked workers share it."""
        self.videos()

    def anno_id(self, video: Video, object_id: str) -> str | None:
        """What `object_mask` takes for an object; None if no expression of the video names it."""
        for e in video.expressions:
            if object_id in e.object_ids:
                return e.anno_ids[e.object_ids.index(object_id)]
        return None

    def frame_path(self, video_id: str, frame: str) -> Path:
        """The JPEG of a frame (by stem)."""
        return Path(self._frame_file(video_id, frame))

    def _frame_file(self, video_id: str, frame: str) -> str:
        return f"{self._frames_folder}/{video_id}/{frame}.jpg"

    @cached_property
    def _frames_folder(self) -> str:
        return str(self.frames_root)

    def frame_size(self, video_id: str, frame: str) -> tuple[int, int]:
        """(H, W) from the JPEG's header. Raises CorpusFault, also for a file that is cut off."""
        path = self._frame_file(video_id, frame)
        try:
            return size_of(path)
        except FileNotFoundError as error:
            raise _missing_frame(path) from error
        except JpegFault as error:
            raise CorpusFault(error.reason, path, str(error)) from error
        except OSError as error:
            raise CorpusFault("unreadable_frame", path, str(error)) from error

    def has_frame(self, video_id: str, frame: str) -> bool:
        """Whether the JPEG is there and not cut off, as its header tells."""
        try:
            self.frame_size(video_id, frame)
        except CorpusFault:
            return False
        return True

    def frame(self, video_id: str, frame: str) -> np.ndarray:
        """uint8 [H, W, 3] RGB. Raises CorpusFault."""
        path = self._frame_file(video_id, frame)
        if not os.path.isfile(path):
            raise _missing_frame(path)
        # Masks are drawn on the stored pixels, so an EXIF rotation must not be applied.
        try:
            rgb = cv2.imread(path, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error as error:
            # a header that promises more pixels than OpenCV takes
            raise CorpusFault("unreadable_frame", path, str(error).strip()) from error
        if rgb is None:
            raise CorpusFault("unreadable_frame", path)
        return rgb

    def masks(
        self, video: Video, expression: Expression, frame_index: int
    ) -> dict[str, np.ndarray]:
        """Object id -> bool [H, W], by ascending id; all False where an object is absent.

        Raises CorpusFault for a mask that cannot be read or is not of its frame's size.
        """
        size = self.frame_size(video.id, video.frames[frame_index])
        pairs = zip(expression.object_ids, expression.anno_ids, strict=True)
        return {o: self.sized_mask(video, a, frame_index, size) for o, a in pairs}

    def sized_mask(
        self, video: Video, anno_id: str, frame_index: int, size: tuple[int, int]
    ) -> np.ndarray:
        """`object_mask`, all False when absent, checked against the frame's (H, W)."""
        mask = self.object_mask(video.id, anno_id, frame_index)
        if mask is None:
            return np.zeros(size, dtype=bool)
        self._check_size(mask.shape, size, video, anno_id, frame_index)
        return mask

    def object_area(
        self, video: Video, anno_id: str, frame_index: int, size: tuple[int, int] | None
    ) -> int:
        """Pixels of an object in a frame; size: the frame's (H, W), if it is there. Raises
        CorpusFault as `sized_mask`."""
        if size is not None:
            return int(np.count_nonzero(self.sized_mask(video, anno_id, frame_index, size)))
        mask = self.object_mask(video.id, anno_id, frame_index)
        return 0 if mask is None else int(np.count_nonzero(mask))

    def object_box(
        self, video: Video, anno_id: str, frame_index: int, size: tuple[int, int]
    ) -> tuple[int, int, int, int] | None:
        """Half-open [x1, y1, x2, y2] of an object in source pixels, None where it is absent; size:
        the frame's (H, W). Raises CorpusFault as `sized_mask`."""
        mask = self.sized_mask(video, anno_id, frame_index, size)
        return tight_box(mask) if mask.any() else None

    def union_area(self, video: Video, anno_ids: Sequence[str], frame_index: int) -> int:
        """Pixels of the union of objects that are in a frame, and whose `object_area` was found
        without fault."""
        masks = [self.object_mask(video.id, a, frame_index) for a in anno_ids]
        there = [m for m in masks if m is not None]
        if len({m.shape for m in there}) > 1:
            place = f"{self.root} {video.id} {video.frames[frame_index]}"
            raise CorpusFault("mask_size", place, "masks of several sizes in one frame")
        return int(np.count_nonzero(np.logical_or.reduce(there))) if there else 0

    def _check_size(
        self, found: tuple[int, ...], size: tuple[int, int], video: Video, anno: str, index: int
    ) -> None:
        if found != size:
            place = f"{self.root} {video.id} {video.frames[index]} object {anno}"
            raise CorpusFault("mask_size", place, f"mask {found}, frame {size}")
