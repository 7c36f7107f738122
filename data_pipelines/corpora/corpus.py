"""The interface of every corpus: videos, frames, expressions, and objects' masks on demand.

Metadata is read at once, images and masks lazily. A `CorpusFault` is a defect of the data (a
missing JPEG, a mask that does not fit its frame): the builder quarantines what it affects and
reports it. A missing or malformed metadata file raises InputError. A broken entry of one video or
expression raises InputError if the corpus was opened `strict`; otherwise it is listed in
`Corpus.faults`.
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

from data_pipelines.corpora.jpeg import JpegFault, size_of
from data_pipelines.corpora.json_node import Node
from data_pipelines.geometry import tight_box
from rcot_rl.errors import InputError

_T = TypeVar("_T")

FOREIGN = "#"
"""Separates donor video and expression in the id of an absent expression; see
`data_pipelines.planning.absent`."""


class CorpusFault(Exception):
    """A defect of the corpus at a known place; `reason` is a machine-readable code."""

    def __init__(self, reason: str, place: str, detail: str = "") -> None:
        self.reason = reason
        self.place = place
        self.detail = detail
        # pass all arguments, so that the exception survives pickling in a worker process
        super().__init__(reason, place, detail)

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def id_order(identifier: str) -> tuple[int, int, str, str]:
    """Return a sort key: integers by value, then other strings."""
    if identifier.isascii() and identifier.isdigit():
        # by length and text: Python refuses to convert a string of very many digits
        digits = identifier.lstrip("0")
        return (0, len(digits), digits, identifier)
    return (1, 0, "", identifier)


@dataclass(frozen=True)
class Expression:
    """One referring expression of one video."""

    id: str
    text: str
    object_ids: tuple[str, ...]
    """The targets, ascending; empty if the target is not in the video or not published."""
    anno_ids: tuple[str, ...] = ()
    """The ids that `object_mask` takes, one for each of `object_ids`; equal for PNG masks."""
    type_id: int | None = None
    """ReVOS: 0 referring, 1 reasoning, 2 no target."""
    unlabelled: bool = False
    """True if the corpus has labels but does not say which objects this sentence describes."""


@dataclass(frozen=True)
class Video:
    """One clip. `frames` are the stems of its JPEGs in time order; ids may contain slashes."""

    id: str
    frames: tuple[str, ...]
    expressions: tuple[Expression, ...]

    @property
    def anno_ids(self) -> list[str]:
        """Annotation ids that its expressions name, sorted as text."""
        return sorted({a for e in self.expressions for a in e.anno_ids})


@dataclass(frozen=True)
class BadEntry:
    """An unreadable metadata entry of a video or of one of its expressions."""

    video: str
    expression_id: str
    """Empty if the whole video's entry is unreadable."""
    fault: CorpusFault


def pair_ids(objects: list[str], annos: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return object ids, ascending, and their annotation ids; each pair once."""
    pairs = sorted(set(zip(objects, annos, strict=True)), key=lambda p: (id_order(p[0]), p[1]))
    return tuple(o for o, _ in pairs), tuple(a for _, a in pairs)


def _file_size(path: str) -> int:
    """Return the number of bytes of a file; -1 if it does not exist."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _missing_frame(path: str) -> CorpusFault:
    """Return the fault of a missing JPEG; it names a file of the same stem in another format."""
    folder, name = os.path.split(path)
    stem = name.removesuffix(".jpg")
    try:
        beside = sorted(n for n in os.listdir(folder) if n.startswith(f"{stem}."))
    except OSError:
        beside = []
    detail = f"there is {beside[0]}; frames must be .jpg" if beside else ""
    return CorpusFault("missing_frame", path, detail)


class Corpus(abc.ABC):
    """One split of a corpus. Masks are bool [H, W], frames uint8 [H, W, 3] RGB, at source size."""

    dataset: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    """Names that `open_corpus` accepts."""

    def __init__(self, root: Path, split: str, strict: bool = True) -> None:
        self.root = root
        self.split = split
        self.strict = strict
        self.faults: list[BadEntry] = []
        """Entries that `videos` left out; empty if strict."""
        self._videos: list[Video] | None = None

    @property
    @abc.abstractmethod
    def expressions_file(self) -> Path:
        """The JSON file with videos and expressions."""

    @property
    @abc.abstractmethod
    def frames_root(self) -> Path:
        """The folder of JPEG images."""

    @property
    @abc.abstractmethod
    def has_masks(self) -> bool:
        """True if this split is published with masks."""

    disjoint: ClassVar[bool] = False
    """True if objects share no pixel, because the layout writes them into one image."""

    def label_bytes(self, video: Video) -> Iterator[bytes]:
        """Yield the content of a video's masks in a fixed order, for `digest`.

        Readers override this with the bytes of their files, which is faster.
        """
        for anno_id in video.anno_ids:
            for index in range(len(video.frames)):
                try:
                    mask = self.object_mask(video.id, anno_id, index)
                except CorpusFault as fault:
                    yield str(fault).encode()
                else:
                    yield b"" if mask is None else repr(mask.shape).encode() + mask.tobytes()

    def digest(self, video: Video) -> str:
        """Return a digest of a video's expressions, masks and the sizes of its frames' files."""
        expressions = [
            (e.id, e.text, e.object_ids, e.anno_ids, e.type_id) for e in video.expressions
        ]
        sizes = [_file_size(self._frame_file(video.id, frame)) for frame in video.frames]
        text = json.dumps([video.id, video.frames, expressions, sizes], separators=(",", ":"))
        sha256 = hashlib.sha256(text.encode())
        for part in self.label_bytes(video):
            sha256.update(part)
        return sha256.hexdigest()

    @abc.abstractmethod
    def _read_videos(self) -> list[Video]: ...

    @abc.abstractmethod
    def object_mask(self, video_id: str, anno_id: str, frame_index: int) -> np.ndarray | None:
        """Read the mask of one object in one frame. Raises CorpusFault.

        Args:
            anno_id: One of `Expression.anno_ids`.

        Returns:
            bool [H, W], or None if the corpus says that the object is not in the frame.
        """

    def annotation_fault(self, video: Video, anno_id: str) -> CorpusFault | None:
        """Return why an annotation as a whole does not fit its video, or None if it does.

        Readers with one mask image per frame have nothing to check here.
        """
        return None

    def published_mask(self, video: Video, anno_id: str, frame_index: int) -> np.ndarray | None:
        """Read one object's mask as the public evaluation scripts do.

        Unlike `object_mask`, this does not check whether the annotation fits the video.
        Raises CorpusFault.

        Returns:
            bool [H, W], or None if the corpus says that the object is not in the frame.
        """
        return self.object_mask(video.id, anno_id, frame_index)

    def videos(self) -> list[Video]:
        """Return all videos with their expressions, in the file's order; metadata only."""
        if self._videos is None:
            self._videos = self._read_videos()
            self._by_id = {v.id: v for v in self._videos}
        return self._videos

    def keep(
        self, nodes: Iterable[tuple[str, Node]], read: Callable[[str, Node], _T], video: str = ""
    ) -> list[_T]:
        """Read every entry; list broken ones in `faults`, or raise InputError if strict.

        Args:
            video: The video whose expressions the entries are; empty for entries of videos.
        """
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
        """Read a video's usable expressions; see `keep`.

        Unless strict, refuses empty sentences, repeated ids and objects that have several
        annotations: rows cannot be made from them.
        """
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
            for ids, message in (
                (expression.object_ids, "an object with several annotations"),
                (expression.anno_ids, "an annotation of several objects"),
            ):
                if len(set(ids)) < len(ids):
                    node.refuse(message)
            return expression

        return tuple(self.keep(nodes, checked, video))

    def read_frames(self, node: Node) -> tuple[str, ...]:
        """Return the frames of a video in time order; InputError if the entry is invalid."""
        frames = tuple(f.path_part() for f in node.elements())
        if not self.strict:
            if not frames:
                node.refuse("no frames")
            if len(set(frames)) < len(frames):
                node.refuse("a frame is listed twice")
        return frames

    def video(self, video_id: str) -> Video:
        """Return one video by id; KeyError if there is none."""
        self.videos()
        return self._by_id[video_id]

    def expression(self, video: Video, expression_id: str) -> Expression:
        """Return one expression of a video; KeyError if there is none.

        The id `VIDEO#ID` names an expression of another video whose target is absent here; see
        `data_pipelines.planning.absent`.
        """
        for e in video.expressions:
            if e.id == expression_id:
                return e
        for at in (k for k, character in enumerate(expression_id) if character == FOREIGN):
            donor, name = expression_id[:at], expression_id[at + 1 :]
            for e in self._by_id[donor].expressions if donor in self._by_id else ():
                if e.id == name:
                    return Expression(expression_id, e.text, ())
        raise KeyError(expression_id)

    def load(self) -> None:
        """Read what is otherwise read at first use, so that forked workers share it."""
        self.videos()

    def anno_id(self, video: Video, object_id: str) -> str | None:
        """Return the annotation id of an object; None if no expression of the video names it."""
        for e in video.expressions:
            if object_id in e.object_ids:
                return e.anno_ids[e.object_ids.index(object_id)]
        return None

    def frame_path(self, video_id: str, frame: str) -> Path:
        """Return the path of a frame's JPEG."""
        return Path(self._frame_file(video_id, frame))

    def _frame_file(self, video_id: str, frame: str) -> str:
        return f"{self._frames_folder}/{video_id}/{frame}.jpg"

    @cached_property
    def _frames_folder(self) -> str:
        return str(self.frames_root)

    def frame_size(self, video_id: str, frame: str) -> tuple[int, int]:
        """Return (H, W) from the JPEG's header; CorpusFault if it is missing or truncated."""
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
        """Return True if the JPEG exists and its header and end marker are intact."""
        try:
            self.frame_size(video_id, frame)
        except CorpusFault:
            return False
        return True

    def frame(self, video_id: str, frame: str) -> np.ndarray:
        """Decode a frame to uint8 [H, W, 3] RGB; CorpusFault if it is missing or unreadable."""
        path = self._frame_file(video_id, frame)
        if not os.path.isfile(path):
            raise _missing_frame(path)
        # masks are drawn on the stored pixels, so an EXIF rotation must not be applied
        try:
            rgb = cv2.imread(path, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error as error:
            # the header declares more pixels than OpenCV accepts
            raise CorpusFault("unreadable_frame", path, str(error).strip()) from error
        if rgb is None:
            raise CorpusFault("unreadable_frame", path)
        return rgb

    def masks(
        self, video: Video, expression: Expression, frame_index: int
    ) -> dict[str, np.ndarray]:
        """Return object id -> bool [H, W] by ascending id, False if absent. Raises CorpusFault."""
        size = self.frame_size(video.id, video.frames[frame_index])
        pairs = zip(expression.object_ids, expression.anno_ids, strict=True)
        return {o: self.sized_mask(video, a, frame_index, size) for o, a in pairs}

    def sized_mask(
        self, video: Video, anno_id: str, frame_index: int, size: tuple[int, int]
    ) -> np.ndarray:
        """Return `object_mask`, all False if absent; CorpusFault unless of the frame's (H, W)."""
        mask = self.object_mask(video.id, anno_id, frame_index)
        if mask is None:
            return np.zeros(size, dtype=bool)
        self._check_size(mask.shape, size, video, anno_id, frame_index)
        return mask

    def object_area(
        self, video: Video, anno_id: str, frame_index: int, size: tuple[int, int] | None
    ) -> int:
        """Return the number of an object's pixels in a frame. Raises CorpusFault.

        Args:
            size: (H, W) of the frame; None if its JPEG is missing.
        """
        if size is not None:
            return int(np.count_nonzero(self.sized_mask(video, anno_id, frame_index, size)))
        mask = self.object_mask(video.id, anno_id, frame_index)
        return 0 if mask is None else int(np.count_nonzero(mask))

    def object_box(
        self, video: Video, anno_id: str, frame_index: int, size: tuple[int, int]
    ) -> tuple[int, int, int, int] | None:
        """Return an object's half-open box [x1, y1, x2, y2] in source pixels; None if absent.

        Raises CorpusFault.

        Args:
            size: (H, W) of the frame.
        """
        mask = self.sized_mask(video, anno_id, frame_index, size)
        return tight_box(mask) if mask.any() else None

    def union_area(self, video: Video, anno_ids: Sequence[str], frame_index: int) -> int:
        """Return the pixels of the union of objects that `object_area` accepted in a frame."""
        masks = [self.object_mask(video.id, a, frame_index) for a in anno_ids]
        present = [m for m in masks if m is not None]
        if len({m.shape for m in present}) > 1:
            place = f"{self.root} {video.id} {video.frames[frame_index]}"
            raise CorpusFault("mask_size", place, "masks of several sizes in one frame")
        return int(np.count_nonzero(np.logical_or.reduce(present))) if present else 0

    def _check_size(
        self, shape: tuple[int, ...], size: tuple[int, int], video: Video, anno: str, index: int
    ) -> None:
        if shape != size:
            place = f"{self.root} {video.id} {video.frames[index]} object {anno}"
            raise CorpusFault("mask_size", place, f"mask {shape}, frame {size}")
