"""Masks that belong to another frame, or to another place in it.

ReVOS' TAO videos have masks of which the i-th belongs to frame 30 i, its UVO videos masks that
drift off (open reports on VISA and ReVOS). Such labels decode without fault. What gives them away
is the image: the outline of a mask should follow edges of its own frame. `fit_table` says how much
colour changes across an outline; it is taken for every mask on every looked-at frame, and an object
is suspect when another assignment of masks to frames (a shift, a stride, reversal), or a growing
displacement, explains most of its masks clearly better than the labels' own. An object that does
not move fits everywhere alike, and is not suspect: there, misplacing changes nothing.

Leaves out single wrong masks in a sound track, and objects seen in fewer than four such frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from data_pipelines.corpora import Corpus, CorpusFault, Video
from data_pipelines.geometry import tight_box
from rcot_rl.recipe.alignment import AlignmentSection

SIDE = 192
"""Longer side at which frames and masks are compared."""
_POINTS = 160
"""Points of an outline that are looked at."""
_DEPTH = 2.5
"""How far inside and outside of the outline colours are taken, in pixels at `SIDE`."""
LEAST_MASKS = 4
"""Of one object, and frames of a video, before anything is said."""
_FEWEST_POINTS = 12
_OFFSETS = np.array([(x, y) for x in range(-20, 21, 4) for y in range(-20, 21, 4)], np.float32)
_HERE = len(_OFFSETS) // 2
"""Position of (0, 0) among the offsets."""
_MOST = 32_000
"""Points that OpenCV's remap takes in a row: fewer than 2^15."""
_STRIDES = (0.25, 0.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Suspect:
    """An object whose labels do not fit the video."""

    anno_id: str
    code: str
    """misaligned_shift, misaligned_stride, misaligned_reversed, mask_drift or sam2_disagrees."""
    detail: str
    """The numbers."""


class NotChecked(Exception):
    """Too few frames of a video can be read."""


class Propagator(Protocol):
    """What level `sam2` needs of a segmenter."""

    def segment(
        self,
        frames_thwc: np.ndarray,
        key: int,
        boxes_source: np.ndarray,
        points_source: np.ndarray | None,
    ) -> np.ndarray:
        """bool [N, T, H, W] from boxes in frame `key`."""
        ...


@dataclass(frozen=True)
class Outline:
    """Points of a mask's outline with their normals, in pixels at `SIDE`."""

    points: np.ndarray
    """float32 [P, 2]: x, y."""
    normals: np.ndarray
    """float32 [P, 2], outward, of length 1."""


def outline(mask: np.ndarray) -> Outline | None:
    """Of the mask (bool [H, W] at `SIDE`); None when too little of it lies inside the image."""
    smooth = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1.5)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    found = [c.reshape(-1, 2) for c in contours if len(c) >= 8]
    if not found:
        return None
    points = np.concatenate(found).astype(np.float32)
    height, width = mask.shape
    margin = _DEPTH + 1
    inside = (points >= margin).all(1) & (points <= [width - 1 - margin, height - 1 - margin]).all(
        1
    )
    points = points[inside]
    if len(points) < _FEWEST_POINTS:
        return None
    points = points[np.linspace(0, len(points) - 1, min(_POINTS, len(points))).astype(int)]
    x, y = points.astype(int).T
    down = np.stack([cv2.Sobel(smooth, cv2.CV_32F, 1, 0)[y, x],
                     cv2.Sobel(smooth, cv2.CV_32F, 0, 1)[y, x]], axis=1)  # fmt: skip
    length = np.linalg.norm(down, axis=1, keepdims=True)
    keep = length[:, 0] > 1e-6
    if keep.sum() < _FEWEST_POINTS:
        return None
    return Outline(points[keep], -down[keep] / length[keep])


def fit_table(lines: Sequence[Outline], frames: Sequence[np.ndarray]) -> np.ndarray:
    """float [L, F]: mean change of colour across each outline on each frame.

    frames: float32 [H, W, 3] at `SIDE`. Changes are capped, so that a few strong edges of the
    background do not outweigh a whole outline.
    """
    if not lines:
        return np.zeros((0, len(frames)))
    lengths = np.array([len(line.points) for line in lines])
    starts = np.cumsum(lengths) - lengths
    points = np.concatenate([line.points for line in lines])
    normals = _DEPTH * np.concatenate([line.normals for line in lines])
    sides = np.stack([points + normals, points - normals])
    out = np.empty((len(lines), len(frames)))
    for number, frame in enumerate(frames):
        pieces = range(0, len(points), _MOST)
        outer, inner = np.concatenate(
            [_colours(frame, sides[:, at : at + _MOST]) for at in pieces], axis=1
        )
        changes = np.minimum(_largest(np.abs(outer - inner)), 60.0)
        out[:, number] = np.add.reduceat(changes, starts) / lengths
    return out


def _largest(changes: np.ndarray) -> np.ndarray:
    """Of the three channels in the last axis; numpy's own reduction is slow for so few."""
    return np.maximum(np.maximum(changes[..., 0], changes[..., 1]), changes[..., 2])


def fits_beside(line: Outline, frame: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """float [O]: the same of one outline moved by each of `offsets` (float32 [O, 2]: x, y)."""
    base = line.points[None] + offsets[:, None].astype(np.float32)
    outer = _colours(frame, base + _DEPTH * line.normals)
    inner = _colours(frame, base - _DEPTH * line.normals)
    return np.minimum(_largest(np.abs(outer - inner)), 60.0).mean(axis=1)


def _colours(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    return cv2.remap(frame, points, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def order_suspect(
    fits: np.ndarray, masks: np.ndarray, section: AlignmentSection
) -> tuple[str, str] | None:
    """(code, detail) when another order of frames explains an object's masks better.

    fits: float [M, F], mask i on frame j of the looked-at frames; masks: int [M], the position of
    each mask among these frames.
    """
    if len(masks) < LEAST_MASKS:
        return None
    n_frames = fits.shape[1]
    own = fits[np.arange(len(masks)), masks]
    best: tuple[float, str, str] | None = None
    for code, name, order in _orders(n_frames):
        target = order(masks)
        valid = (target >= 0) & (target < n_frames) & (target != masks)
        if valid.sum() < max(LEAST_MASKS, 0.5 * len(masks)):
            continue
        other = fits[np.flatnonzero(valid), target[valid]]
        mine = own[valid]
        gain = float(other.mean() / max(mine.mean(), 1e-6) - 1)
        share = float((other > mine).mean())
        if gain > section.gain and share >= section.agreement and (best is None or gain > best[0]):
            detail = f"{name} fits {gain:.0%} better, in {share:.0%} of {valid.sum()} masks"
            best = (gain, code, detail)
    return None if best is None else best[1:]


def _orders(n: int) -> list[tuple[str, str, Callable[[np.ndarray], np.ndarray]]]:
    reach = max(1, n // 3)
    shifts = [
        ("misaligned_shift", f"a shift of {k:+d} looked-at frames", lambda m, k=k: m + k)
        for k in range(-reach, reach + 1)
        if k
    ]
    strides = [
        (
            "misaligned_stride",
            f"a stride of {s:g}",
            lambda m, s=s: np.rint(m * s).astype(int),
        )
        for s in _STRIDES
    ]
    backwards = ("misaligned_reversed", "the reverse order", lambda m: n - 1 - m)
    return [*shifts, *strides, backwards]


def drift_suspect(
    lines: Sequence[Outline], frames: Sequence[np.ndarray], section: AlignmentSection
) -> tuple[str, str] | None:
    """(code, detail) when masks fit clearly better beside where they are, farther and farther.

    lines, frames: an object's outlines in time order, and each one's own frame.
    """
    if len(lines) < LEAST_MASKS:
        return None
    far = []
    for line, frame in zip(lines, frames, strict=True):
        values = fits_beside(line, frame, _OFFSETS)
        at = int(values.argmax())
        better = values[at] > 1.25 * values[_HERE]
        far.append(float(np.hypot(*_OFFSETS[at])) / SIDE if better else 0.0)
    later = far[len(far) // 2 :]
    share = float(np.mean([f >= section.drift for f in later]))
    growing = float(np.mean(later)) > 1.5 * float(np.mean(far[: len(far) // 3]) + 1e-9)
    if share < section.agreement or not growing:
        return None
    detail = f"masks lie {np.mean(later):.0%} of the frame off in {share:.0%} of the later ones"
    return "mask_drift", detail


def suspects(
    corpus: Corpus,
    video: Video,
    annos: Mapping[str, np.ndarray],
    section: AlignmentSection,
    there: np.ndarray,
) -> list[Suspect]:
    """Objects of a video whose masks do not fit its frames. Raises NotChecked.

    annos: annotation id -> int [T], its pixels in each frame (0: not there); there: int, ascending
    indices of the frames whose file is there.
    """
    chosen, images = _looked_at(corpus, video, _spread(there, section.frames))
    frames = [_small(image) for image in images]
    tracks = {anno: _track(corpus, video, anno, areas, chosen) for anno, areas in annos.items()}
    table = fit_table([line for _, lines in tracks.values() for line in lines], frames)
    out, row = [], 0
    for anno, (at, lines) in tracks.items():
        fits, row = table[row : row + len(lines)], row + len(lines)
        found = order_suspect(fits, np.array(at, dtype=int), section)
        found = found or drift_suspect(lines, [frames[p] for p in at], section)
        if found is not None:
            out.append(Suspect(anno, *found))
    return out


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the indices, evenly spaced."""
    n = len(indices)
    return indices[np.unique(np.linspace(0, n - 1, min(most, n)).astype(int))] if n else indices


def _looked_at(
    corpus: Corpus, video: Video, wanted: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(indices, frames) of those that decode; rows that show another will say so. Raises
    NotChecked."""
    found, images = [], []
    for t in wanted:
        try:
            images.append(corpus.frame(video.id, video.frames[t]))
            found.append(t)
        except CorpusFault:
            continue
    if len(found) < LEAST_MASKS:
        raise NotChecked(f"{len(found)} of {len(video.frames)} frames can be read")
    return np.array(found, dtype=int), images


def _track(
    corpus: Corpus, video: Video, anno: str, areas: np.ndarray, chosen: np.ndarray
) -> tuple[list[int], list[Outline]]:
    """Positions among the looked-at frames where the object has an outline, and these."""
    at, lines = [], []
    for position, t in enumerate(chosen):
        mask = corpus.object_mask(video.id, anno, int(t)) if areas[t] else None
        line = None if mask is None else outline(_small_mask(mask))
        if line is not None:
            at.append(position)
            lines.append(line)
    return at, lines


def sam2_suspects(
    corpus: Corpus,
    video: Video,
    annos: Mapping[str, np.ndarray],
    section: AlignmentSection,
    propagator: Propagator,
    there: np.ndarray,
) -> list[Suspect]:
    """Objects that a segmenter, prompted by the box of their largest mask, finds elsewhere.

    Arguments and errors as `suspects`.
    """
    out = []
    for anno, areas in annos.items():
        seen = there[areas[there] > 0]
        if len(seen) < LEAST_MASKS:
            continue
        wanted = np.append(_spread(there, section.frames), seen[areas[seen].argmax()])
        chosen, images = _looked_at(corpus, video, np.unique(wanted))
        key = int(chosen[areas[chosen].argmax()])
        if not areas[key]:
            continue
        frames = np.stack(images)
        labels = {int(t): corpus.object_mask(video.id, anno, int(t)) for t in chosen if areas[t]}
        box = np.array([tight_box(labels[key])], dtype=np.float32)
        masks = propagator.segment(frames, int(np.flatnonzero(chosen == key)[0]), box, None)[0]
        ious = [
            _iou(masks[i], labels[int(t)])
            for i, t in enumerate(chosen)
            if int(t) in labels and t != key
        ]
        if len(ious) >= LEAST_MASKS - 1 and np.mean(ious) < section.min_iou:
            detail = f"mean IoU {np.mean(ious):.2f} over {len(ious)} frames"
            out.append(Suspect(anno, "sam2_disagrees", detail))
    return out


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def _small(frame: np.ndarray) -> np.ndarray:
    scale = SIDE / max(frame.shape[:2])
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.GaussianBlur(cv2.resize(frame, size, interpolation=how), (0, 0), 0.8).astype(
        np.float32
    )


def _small_mask(mask: np.ndarray) -> np.ndarray:
    scale = SIDE / max(mask.shape)
    size = (max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale)))
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) >= 0.5
