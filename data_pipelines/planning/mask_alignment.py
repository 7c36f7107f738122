"""Find objects whose masks belong to another frame, or to another place in it.

In ReVOS' TAO videos the i-th mask of some objects belongs to frame 30 i; in its UVO videos some
masks drift off (open reports on VISA and ReVOS). Such labels decode without error. The image gives
them away: the outline of a mask should follow edges of its frame. `fit_table` measures the change
of colour across every outline on every sampled frame. An object is suspect if another assignment of
masks to frames (a shift, a stride, reversal) or a growing displacement explains most of its masks
clearly better than the labels do. An object that does not move fits equally everywhere and is not
suspect: misplacing its masks changes nothing.

Does not find single wrong masks in a sound track, nor objects in fewer than four sampled frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np

from data_pipelines.corpora import Corpus, CorpusFault, Video
from data_pipelines.geometry import mask_overlap, tight_box
from rcot_rl.recipe.data_section import AlignmentSection

if TYPE_CHECKING:
    from rcot_rl.segmentation.segmenter import VideoSegmenter

SIDE = 192
"""Longer side, in pixels, at which frames and masks are compared."""
MIN_MASKS = 4
"""Minimum number of masks of an object, and of frames of a video, for a verdict."""
_MAX_POINTS = 160
"""Points sampled from an outline."""
_MIN_POINTS = 12
_DEPTH = 2.5
"""Distance from the outline at which colours are read on both sides, in pixels at `SIDE`."""
_MAX_CHANGE = 60.0
"""Cap of the change of colour at one point: a few strong background edges must not dominate."""
_OFFSETS = np.array([(x, y) for x in range(-20, 21, 4) for y in range(-20, 21, 4)], np.float32)
_NO_OFFSET = len(_OFFSETS) // 2
"""Position of (0, 0) among the offsets."""
_REMAP_POINTS = 32_000
"""Points per row of OpenCV's remap, which accepts fewer than 2^15."""
_STRIDES = (0.25, 0.5, 2.0, 3.0, 4.0)

AlignmentCode = Literal[
    "misaligned_shift", "misaligned_stride", "misaligned_reversed", "mask_drift", "sam2_disagrees"
]


@dataclass(frozen=True)
class Suspect:
    """An object whose masks do not fit its video."""

    anno_id: str
    code: AlignmentCode
    detail: str
    """The measured numbers."""


class AlignmentNotChecked(Exception):
    """Too few frames of a video can be read."""


@dataclass(frozen=True)
class Outline:
    """Points of a mask's outline and their normals, in pixels at `SIDE`."""

    points: np.ndarray
    """float32 [P, 2]: (x, y)."""
    normals: np.ndarray
    """float32 [P, 2]: outward unit vectors."""


def outline(mask: np.ndarray) -> Outline | None:
    """Sample the outline of a mask (bool [H, W] at `SIDE`).

    Returns:
        None if too little of the outline lies inside the image.
    """
    smooth = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1.5)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    long_enough = [c.reshape(-1, 2) for c in contours if len(c) >= 8]
    if not long_enough:
        return None
    points = np.concatenate(long_enough).astype(np.float32)
    height, width = mask.shape
    low = _DEPTH + 1
    high = [width - 1 - low, height - 1 - low]
    points = points[(points >= low).all(1) & (points <= high).all(1)]
    if len(points) < _MIN_POINTS:
        return None
    points = points[np.linspace(0, len(points) - 1, min(_MAX_POINTS, len(points))).astype(int)]
    x, y = points.astype(int).T
    slopes = (cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    inward = np.stack([slope[y, x] for slope in slopes], axis=1)
    length = np.linalg.norm(inward, axis=1, keepdims=True)
    keep = length[:, 0] > 1e-6
    if keep.sum() < _MIN_POINTS:
        return None
    return Outline(points[keep], -inward[keep] / length[keep])


def fit_table(lines: Sequence[Outline], frames: Sequence[np.ndarray]) -> np.ndarray:
    """Return float [L, F]: mean change of colour across each outline on each frame.

    Args:
        lines: L outlines.
        frames: F frames, float32 [H, W, 3] at `SIDE`.
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
        pieces = range(0, len(points), _REMAP_POINTS)
        outer, inner = np.concatenate(
            [_colours(frame, sides[:, at : at + _REMAP_POINTS]) for at in pieces], axis=1
        )
        out[:, number] = np.add.reduceat(_change(outer, inner), starts) / lengths
    return out


def _change(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Return the largest difference of the channels in the last axis, capped."""
    diff = np.abs(outer - inner)
    # numpy's reduction over an axis of three is slow
    largest = np.maximum(np.maximum(diff[..., 0], diff[..., 1]), diff[..., 2])
    return np.minimum(largest, _MAX_CHANGE)


def fits_at_offsets(line: Outline, frame: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return float [O]: as `fit_table`, for one outline moved by each offset.

    Args:
        offsets: float32 [O, 2]: (x, y) in pixels at `SIDE`.
    """
    base = line.points[None] + offsets[:, None].astype(np.float32)
    outer = _colours(frame, base + _DEPTH * line.normals)
    inner = _colours(frame, base - _DEPTH * line.normals)
    return _change(outer, inner).mean(axis=1)


def _colours(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    # `points` holds both coordinates, so there is no second map; OpenCV's stubs require one
    return cv2.remap(  # type: ignore[call-overload]
        frame, points, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )


def order_suspect(
    fits: np.ndarray, masks: np.ndarray, section: AlignmentSection
) -> tuple[AlignmentCode, str] | None:
    """Return (code, detail) if another order of frames explains an object's masks better.

    Args:
        fits: float [M, F]: mask i on the sampled frame j.
        masks: int [M]: position of each mask among the sampled frames.
    """
    if len(masks) < MIN_MASKS:
        return None
    n_frames = fits.shape[1]
    labelled = fits[np.arange(len(masks)), masks]
    best: tuple[float, AlignmentCode, str] | None = None
    for code, name, order in _orders(n_frames):
        target = order(masks)
        valid = (target >= 0) & (target < n_frames) & (target != masks)
        if valid.sum() < max(MIN_MASKS, 0.5 * len(masks)):
            continue
        other = fits[np.flatnonzero(valid), target[valid]]
        current = labelled[valid]
        gain = float(other.mean() / max(current.mean(), 1e-6) - 1)
        share = float((other > current).mean())
        if gain > section.gain and share >= section.agreement and (best is None or gain > best[0]):
            detail = f"{name} fits {gain:.0%} better, in {share:.0%} of {valid.sum()} masks"
            best = (gain, code, detail)
    return None if best is None else best[1:]


_Order = Callable[[np.ndarray], np.ndarray]


def _orders(n: int) -> list[tuple[AlignmentCode, str, _Order]]:
    """Return (code, name, mapping of mask positions to frame positions) for `n` sampled frames."""

    def shift(k: int) -> _Order:
        return lambda masks: masks + k

    def stride(factor: float) -> _Order:
        return lambda masks: np.rint(masks * factor).astype(int)

    reach = max(1, n // 3)
    orders: list[tuple[AlignmentCode, str, _Order]] = [
        ("misaligned_shift", f"a shift of {k:+d} sampled frames", shift(k))
        for k in range(-reach, reach + 1)
        if k
    ]
    orders += [("misaligned_stride", f"a stride of {s:g}", stride(s)) for s in _STRIDES]
    orders.append(("misaligned_reversed", "the reverse order", lambda masks: n - 1 - masks))
    return orders


def drift_suspect(
    lines: Sequence[Outline], frames: Sequence[np.ndarray], section: AlignmentSection
) -> tuple[AlignmentCode, str] | None:
    """Return (code, detail) if masks fit clearly better at offsets that grow with time.

    Args:
        lines: An object's outlines in time order.
        frames: The frame of each outline.
    """
    if len(lines) < MIN_MASKS:
        return None
    distances = []
    for line, frame in zip(lines, frames, strict=True):
        values = fits_at_offsets(line, frame, _OFFSETS)
        at = int(values.argmax())
        better = values[at] > 1.25 * values[_NO_OFFSET]
        distances.append(float(np.hypot(*_OFFSETS[at])) / SIDE if better else 0.0)
    later = distances[len(distances) // 2 :]
    share = float(np.mean([d >= section.drift for d in later]))
    first_third = float(np.mean(distances[: len(distances) // 3]) + 1e-9)
    growing = float(np.mean(later)) > 1.5 * first_third
    if share < section.agreement or not growing:
        return None
    detail = f"masks lie {np.mean(later):.0%} of the frame off in {share:.0%} of the later ones"
    return "mask_drift", detail


def suspects(
    corpus: Corpus,
    video: Video,
    annos: Mapping[str, np.ndarray],
    section: AlignmentSection,
    available: np.ndarray,
) -> list[Suspect]:
    """Return the objects of a video whose masks do not fit its frames. Raises AlignmentNotChecked.

    Args:
        annos: annotation id -> int [T]: its pixels in each frame; 0 where it is absent.
        available: int: ascending indices of the frames whose JPEG exists.
    """
    chosen, images = _sampled(corpus, video, _spread(available, section.frames))
    frames = [_small(image) for image in images]
    tracks = {anno: _track(corpus, video, anno, areas, chosen) for anno, areas in annos.items()}
    table = fit_table([line for _, lines in tracks.values() for line in lines], frames)
    out, row = [], 0
    for anno, (at, lines) in tracks.items():
        fits, row = table[row : row + len(lines)], row + len(lines)
        fault = order_suspect(fits, np.array(at, dtype=int), section)
        fault = fault or drift_suspect(lines, [frames[p] for p in at], section)
        if fault is not None:
            out.append(Suspect(anno, *fault))
    return out


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` of the indices, evenly spaced."""
    n = len(indices)
    return indices[np.unique(np.linspace(0, n - 1, min(most, n)).astype(int))] if n else indices


def _sampled(
    corpus: Corpus, video: Video, wanted: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return indices and images of the wanted frames that decode; rows report the others."""
    indices, images = [], []
    for t in wanted:
        try:
            images.append(corpus.frame(video.id, video.frames[t]))
            indices.append(t)
        except CorpusFault:
            continue
    if len(indices) < MIN_MASKS:
        raise AlignmentNotChecked(f"{len(indices)} of {len(video.frames)} frames can be read")
    return np.array(indices, dtype=int), images


def _track(
    corpus: Corpus, video: Video, anno: str, areas: np.ndarray, chosen: np.ndarray
) -> tuple[list[int], list[Outline]]:
    """Return the object's outlines, and their positions among the sampled frames."""
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
    propagator: VideoSegmenter,
    available: np.ndarray,
) -> list[Suspect]:
    """Return the objects that a segmenter, prompted by the box of their largest mask, places
    elsewhere.

    Arguments and errors as `suspects`.
    """
    out = []
    for anno, areas in annos.items():
        seen = available[areas[available] > 0]
        if len(seen) < MIN_MASKS:
            continue
        wanted = np.append(_spread(available, section.frames), seen[areas[seen].argmax()])
        chosen, images = _sampled(corpus, video, np.unique(wanted))
        key = int(chosen[areas[chosen].argmax()])
        if not areas[key]:
            continue
        masks_t = {int(t): corpus.object_mask(video.id, anno, int(t)) for t in chosen if areas[t]}
        labels = {t: mask for t, mask in masks_t.items() if mask is not None}
        box = np.array([tight_box(labels[key])], dtype=np.float32)
        ious = [
            mask_overlap(masks[0], labels[int(chosen[i])])
            for i, masks in propagator.segment(images, int(np.searchsorted(chosen, key)), box, None)
            if int(chosen[i]) in labels and chosen[i] != key
        ]
        if len(ious) >= MIN_MASKS - 1 and np.mean(ious) < section.min_iou:
            detail = f"mean IoU {np.mean(ious):.2f} over {len(ious)} frames"
            out.append(Suspect(anno, "sam2_disagrees", detail))
    return out


def _small(frame: np.ndarray) -> np.ndarray:
    scale = SIDE / max(frame.shape[:2])
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized = cv2.resize(frame, size, interpolation=interpolation)
    return cv2.GaussianBlur(resized, (0, 0), 0.8).astype(np.float32)


def _small_mask(mask: np.ndarray) -> np.ndarray:
    scale = SIDE / max(mask.shape)
    size = (max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale)))
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) >= 0.5
