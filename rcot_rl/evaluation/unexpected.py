"""Unknown names and improper values in a folder of predictions, with their likely cause.

Predictions are `<video>/<expression_id>/<frame>.png`, single channel, 0 or 255. Other names are not
read, and every value other than 0 counts as object, as in the public scripts. Both give good masks
low scores, so both are reported. Hidden files and `__MACOSX` are ignored.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from data_pipelines.geometry import mask_overlap

IMAGES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy", ".npz")
)
"""Extensions of files that may be meant as masks."""

COUNTS_AS_OBJECT = "every pixel that is not 0 counts as object"
_IGNORED = ("__MACOSX", "Thumbs.db", "desktop.ini")
_SHOWN = 3
_NEAR = 20
"""JPEG compression changes a value of a mask by less than this."""
_LABELS = 32
"""Label images rarely have more values."""


class Unexpected(TypedDict):
    """One entry of a result's `unexpected`."""

    place: str
    """`video/expression`, or a folder of the predictions."""
    reason: str
    cause: str
    """The likely cause; empty if it is not known."""


def is_ignored(name: str) -> bool:
    """Return True for hidden files and files that operating systems create."""
    return name.startswith(".") or name in _IGNORED


def unknown_files(
    place: str, frames: Sequence[str], files: Collection[str]
) -> Iterator[Unexpected]:
    """Report files of an expression's folder whose name is not that of a frame.

    Args:
        place: `video/expression`.
        frames: The stems of the video's frames.
    """
    images = [n for n in sorted(files) if os.path.splitext(n)[1].lower() in IMAGES]
    expected = {f"{frame}.png" for frame in frames}
    unknown = [name for name in images if name not in expected and not is_ignored(name)]
    if not unknown:
        return
    present = [os.path.splitext(n)[0] for n in images if not is_ignored(n)]
    extensions = sorted({os.path.splitext(n)[1] for n in unknown} - {".png"})
    cause = name_cause(frames, present)
    if extensions:
        masks = f"masks must be .png files, not {', '.join(extensions)}"
        cause = f"{masks}; {cause}" if cause else masks
    missing = expected - {*images}
    absent = f"; missing: {_some(missing)}" if missing else ""
    reason = f"{_files(len(unknown))} no frame of the video: {_some(unknown)}{absent}"
    yield Unexpected(place=place, reason=reason, cause=cause)


def unknown_folders(root: Path, places: Iterable[tuple[str, str]]) -> Iterator[Unexpected]:
    """Report folders and images that belong to no expression of the corpus.

    Args:
        places: Every (video, expression id) of the corpus.
    """
    children: dict[tuple[str, ...], set[str]] = {(): set()}
    leaves = set()
    for video, expression in places:
        parts = (*video.split("/"), *expression.split("/"))
        leaves.add(parts)
        for depth, part in enumerate(parts):
            children.setdefault(parts[:depth], set()).add(part)
    for parts, expected in children.items():
        folders, images = _listed(root.joinpath(*parts))
        place = "/".join(parts) or "."
        unknown = sorted(folders - expected)
        if unknown:
            missing = expected - folders
            cause = name_cause(sorted(expected), sorted(folders)) if missing else ""
            inside = next((n for n in unknown if _holds(root.joinpath(*parts, n), missing)), None)
            if inside is not None:
                cause = f"the predictions lie one folder deeper, in {inside}"
            absent = f"; missing: {_some(missing)}" if missing else ""
            reason = f"{_folders(len(unknown))} not of this corpus: {_some(unknown)}{absent}"
            yield Unexpected(place=place, reason=reason, cause=cause)
        if images and parts not in leaves:
            reason = f"{_files(len(images))} no expression of the corpus: {_some(images)}"
            cause = "masks lie in <video>/<expression_id>/<frame>.png"
            yield Unexpected(place=place, reason=reason, cause=cause)


def name_cause(expected: Sequence[str], present: Sequence[str]) -> str:
    """Return why `present` names probably differ from the `expected` ones; "" if unknown."""
    unknown, missing = set(present) - set(expected), set(expected) - set(present)
    if not unknown:
        return ""
    folded = {name.lower(): name for name in missing}
    if all(name.lower() in folded for name in unknown):
        name = min(unknown)
        return f"upper and lower case differ: {folded[name.lower()]} is expected, {name} found"
    wanted, given = _numbers(expected), _numbers(present)
    if wanted and given:
        return _number_cause(wanted, given, bool(missing))
    for name in sorted(unknown):
        inner = max((e for e in missing if e in name), key=len, default=None)
        if inner is not None:
            return f"names have an addition: {inner} is expected, {name} found"
    return ""


def value_cause(values: Collection[int], palette: bool = False) -> tuple[str, str] | None:
    """Return (reason, likely cause) for masks with improper values; None for proper masks.

    Args:
        values: All values of an expression's masks.
        palette: The values are indices of palette images, in which an object may have any index.
    """
    ordered = sorted(values)
    objects = [v for v in ordered if v]
    proper = not objects or objects in ([1], [255]) or (palette and len(objects) == 1)
    if proper:
        return None
    reason = f"values {_spans(ordered)} where 0 and 255 are expected; {COUNTS_AS_OBJECT}"
    if len(objects) == 1 and len(ordered) > 1:
        return reason, f"objects are {objects[0]} instead of 255"
    labels = "labels of several objects"
    if palette:
        return reason, labels
    if ordered == list(range(ordered[-1] + 1)) and len(ordered) <= _LABELS:
        return reason, f"JPEG-compressed or soft mask, or {labels}"
    if all(v < _NEAR or v > 255 - _NEAR for v in ordered):
        return reason, "JPEG-compressed or soft mask"
    return reason, "soft mask: grey values that were saved without a threshold"


def looks_inverted(masks_thw: np.ndarray, truth_thw: np.ndarray) -> str:
    """Return the likely cause if only the complement of the masks fits the truth, else ""."""
    if not truth_thw.any() or 2 * np.count_nonzero(masks_thw) <= masks_thw.size:
        return ""
    plain, inverted = (mask_overlap(m, truth_thw) for m in (masks_thw, ~masks_thw))
    if inverted < 0.5 or plain > inverted / 2:
        return ""
    scores = f"J {100 * plain:.1f}, inverted {100 * inverted:.1f}"
    return f"inverted masks (objects 0, background 255): {scores}"


def _number_cause(wanted: dict[int, str], given: dict[int, str], missing: bool) -> str:
    """Return the cause of `name_cause` for names that are numbers: {number: name}."""
    numbers, present = sorted(wanted), sorted(given)
    first = f"{given[present[0]]}… where {wanted[numbers[0]]}… is expected"
    widths = [sorted({len(name) for name in names.values()}) for names in (wanted, given)]
    padded = widths[0] != widths[1] and any(given[n] != wanted[n] for n in numbers if n in given)
    padding = (
        f"another zero padding: {_either(widths[0])} digits expected, {_either(widths[1])} found"
    )
    if set(present) <= set(numbers):
        return padding if padded else ""
    if not missing and set(numbers) <= set(present):
        return f"more frames than the corpus has: {len(present)} instead of {len(numbers)}"
    shifts = sorted({present[0] - numbers[0], present[-1] - numbers[-1]}, key=abs)
    for shift in shifts:
        if shift and all(n - shift in wanted for n in present):
            by = {1: "one", -1: "minus one"}.get(shift, str(shift))
            wide = f", and {padding}" if widths[0][-1:] != widths[1][-1:] else ""
            return f"names are shifted by {by}: {first}{wide}"
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if present == list(range(present[0], present[0] + len(present))) and steps != {1}:
        some = ", ".join(wanted[n] for n in numbers[:3])
        return f"frames are counted ({first}); the corpus names them {some}…"
    return padding if padded else ""


def _numbers(names: Iterable[str]) -> dict[int, str]:
    """Return {number: name}, or {} unless all names are short numbers."""
    names = list(names)
    if not all(n.isascii() and n.isdigit() and len(n) <= 18 for n in names):
        return {}
    return {int(n): n for n in names}


def _either(widths: Sequence[int]) -> str:
    return " or ".join(map(str, widths))


def _spans(values: Sequence[int]) -> str:
    """Format sorted integers, consecutive ones as `a..b`; more than four spans as one range."""
    spans: list[list[int]] = []
    for value in values:
        if spans and value == spans[-1][-1] + 1:
            spans[-1][1:] = [value]
        else:
            spans.append([value])
    if len(spans) > 4:
        return f"{values[0]}..{values[-1]}"
    return ", ".join("..".join(map(str, span)) for span in spans)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _files(count: int) -> str:
    return "1 file belongs to" if count == 1 else f"{count} files belong to"


def _folders(count: int) -> str:
    return "1 folder is" if count == 1 else f"{count} folders are"


def _listed(folder: Path) -> tuple[set[str], list[str]]:
    """Return (names of folders, names of images) in a folder; empty if it is not readable."""
    folders, images = set(), []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_ignored(entry.name):
                    continue
                if entry.is_dir():
                    folders.add(entry.name)
                elif os.path.splitext(entry.name)[1].lower() in IMAGES:
                    images.append(entry.name)
    except OSError:
        return set(), []
    return folders, sorted(images)


def _holds(folder: Path, names: Collection[str]) -> bool:
    return any((folder / name).is_dir() for name in names)
