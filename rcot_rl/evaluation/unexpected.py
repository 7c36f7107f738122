"""Names and values that a folder of predictions should not have, and what probably caused them.

Predictions are `<video>/<expression_id>/<frame>.png`, single channel, 0 or 255. Other names are not
read, and every other value than 0 counts as object, as in the public scripts: both turn good masks
into low scores, so both are reported. Hidden files and `__MACOSX` are ignored.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

IMAGES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy", ".npz")
)
"""Extensions of what may have been meant as a mask."""

COUNTS_AS_OBJECT = "every pixel that is not 0 counts as object"
_IGNORED = ("__MACOSX", "Thumbs.db", "desktop.ini")
_SHOWN = 3
_NEAR = 20
"""JPEG compression moves a value of a mask by less than this."""
_LABELS = 32
"""Images of labels rarely hold more objects."""


class Unexpected(TypedDict):
    """One entry of a result's `unexpected`."""

    place: str
    """`video/expression`, or a folder of the predictions."""
    reason: str
    cause: str
    """The likely cause; empty if it is not known."""


def is_ignored(name: str) -> bool:
    """Return True for hidden files and what operating systems leave behind."""
    return name.startswith(".") or name in _IGNORED


def unknown_files(
    place: str, frames: Sequence[str], files: Collection[str]
) -> Iterator[Unexpected]:
    """Report files of an expression's folder that are named like no frame.

    Args:
        place: `video/expression`.
        frames: The stems of the video's frames.
        files: Names of the folder's files.
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
    absent = "; missing: " + _some(missing) if (missing := expected - {*images}) else ""
    reason = f"{_files(len(unknown))} no frame of the video: {_some(unknown)}{absent}"
    yield Unexpected(place=place, reason=reason, cause=cause)


def unknown_folders(root: Path, places: Iterable[tuple[str, str]]) -> Iterator[Unexpected]:
    """Report folders and images that belong to no expression of the corpus.

    Args:
        root: The folder of predictions.
        places: Every (video, expression id) of the corpus.
    """
    children: dict[tuple[str, ...], set[str]] = {(): set()}
    own = set()
    for video, expression in places:
        parts = (*video.split("/"), *expression.split("/"))
        own.add(parts)
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
        if images and parts not in own:
            reason = f"{_files(len(images))} no expression of the corpus: {_some(images)}"
            cause = "masks lie in <video>/<expression_id>/<frame>.png"
            yield Unexpected(place=place, reason=reason, cause=cause)


def name_cause(expected: Sequence[str], present: Sequence[str]) -> str:
    """Return why `present` names are probably not the `expected` ones; empty if unknown."""
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
    """Return (what, likely cause) for masks that are not of two values; None for proper ones.

    Args:
        values: Every value of an expression's masks.
        palette: The values are indices of palette images, in which an object may have any index.
    """
    found = sorted(values)
    objects = [v for v in found if v]
    proper = not objects or objects in ([1], [255]) or (palette and len(objects) == 1)
    if proper:
        return None
    what = f"values {_spans(found)} where 0 and 255 are expected; {COUNTS_AS_OBJECT}"
    if len(objects) == 1 and len(found) > 1:
        return what, f"objects are {objects[0]} instead of 255"
    labels = "labels of several objects"
    if palette:
        return what, labels
    if found == list(range(found[-1] + 1)) and len(found) <= _LABELS:
        return what, f"JPEG-compressed or soft mask, or {labels}"
    if all(v < _NEAR or v > 255 - _NEAR for v in found):
        return what, "JPEG-compressed or soft mask"
    return what, "soft mask: grey values that were saved without a threshold"


def looks_inverted(masks_thw: np.ndarray, truth_thw: np.ndarray) -> str:
    """Return the likely cause if the complement of masks fits the truth, and they do not."""
    if not truth_thw.any() or 2 * np.count_nonzero(masks_thw) <= masks_thw.size:
        return ""
    own, other = (_overlap(m, truth_thw) for m in (masks_thw, ~masks_thw))
    if other < 0.5 or own > other / 2:
        return ""
    return (
        f"inverted masks (objects 0, background 255): J {100 * own:.1f}, inverted {100 * other:.1f}"
    )


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def _number_cause(wanted: dict[int, str], given: dict[int, str], missing: bool) -> str:
    """As `name_cause`, for names that are numbers: {number: name}."""
    numbers, there = sorted(wanted), sorted(given)
    first = f"{given[there[0]]}… where {wanted[numbers[0]]}… is expected"
    widths = [sorted({len(name) for name in names.values()}) for names in (wanted, given)]
    padded = widths[0] != widths[1] and any(given[n] != wanted[n] for n in numbers if n in given)
    padding = (
        f"another zero padding: {_either(widths[0])} digits expected, {_either(widths[1])} found"
    )
    if set(there) <= set(numbers):
        return padding if padded else ""
    if not missing and set(numbers) <= set(there):
        return f"more frames than the corpus has: {len(there)} instead of {len(numbers)}"
    shifts = sorted({there[0] - numbers[0], there[-1] - numbers[-1]}, key=abs)
    for shift in shifts:
        if shift and all(n - shift in wanted for n in there):
            by = {1: "one", -1: "minus one"}.get(shift, str(shift))
            wide = f", and {padding}" if widths[0][-1:] != widths[1][-1:] else ""
            return f"names are shifted by {by}: {first}{wide}"
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if there == list(range(there[0], there[0] + len(there))) and steps != {1}:
        some = ", ".join(wanted[n] for n in numbers[:3])
        return f"frames are counted ({first}); the corpus names them {some}…"
    return padding if padded else ""


def _numbers(names: Iterable[str]) -> dict[int, str]:
    """{number: name}; empty unless all names are short numbers."""
    names = list(names)
    if not all(n.isascii() and n.isdigit() and len(n) <= 18 for n in names):
        return {}
    return {int(n): n for n in names}


def _either(widths: Sequence[int]) -> str:
    return " or ".join(map(str, widths))


def _spans(values: Sequence[int]) -> str:
    """Sorted integers, consecutive ones as `a..b`; at most four spans."""
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
    """(names of the folders, names of the images) in a folder; nothing for none."""
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
