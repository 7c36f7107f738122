"""Region similarity J and boundary accuracy F, equal to the DAVIS 2017 reference to the last bit.

J is the intersection over the union. F is the harmonic mean of precision and recall of boundary
pixels; a pixel matches within a disk of radius ceil(0.008 · image diagonal).

Edge cases, as in the reference: J = 1 if both masks are empty; F = 1 if neither has a boundary (so
a full frame against an empty one has J = 0 and F = 1) and 0 if only one has none.

Masks are packed, 64 pixels per word, so that a boundary takes a few shifts and XORs, a dilation a
few shifts and ORs, and an area a population count. Only the window around both masks is processed.
Left out: the reference's recall and decay statistics over a sequence.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

BOUND_TH = 0.008
"""Share of the image diagonal within which boundaries match."""

_ONE = np.uint64(1)
_CARRY = np.uint64(63)


def region_similarity(gt: np.ndarray, pred: np.ndarray) -> float | np.ndarray:
    """Return J of two masks or of each frame of two videos. Raises ValueError.

    Args:
        gt: Ground truth, [H, W] or [T, H, W]; any non-zero pixel is foreground.
        pred: Prediction of the same shape.

    Returns:
        A float for masks, float64 [T] for videos.
    """
    gt_thw, pred_thw = _as_videos(gt, pred)
    frames = zip(_pack(gt_thw), _pack(pred_thw), strict=True)
    areas = [(_area(g & p), _area(g | p)) for g, p in frames]
    scores = np.array([shared / union if union else 1.0 for shared, union in areas])
    return scores if gt.ndim == 3 else float(scores[0])


def jf_video(
    gt_thw: np.ndarray,
    pred_thw: np.ndarray,
    bound_th: float = BOUND_TH,
) -> tuple[np.ndarray, np.ndarray]:
    """Return J and F of each frame, both float64 [T]. Raises ValueError.

    Args:
        gt_thw: Ground truth, [T, H, W]; any non-zero pixel is foreground.
        pred_thw: Prediction of the same shape.
        bound_th: A share of the diagonal below 1, or a whole number of pixels.
    """
    if gt_thw.ndim != 3:
        raise ValueError(f"masks must be [T, H, W], not of shape {gt_thw.shape}")
    _as_videos(gt_thw, pred_thw)
    return _score(_pack(gt_thw), _pack(pred_thw), gt_thw.shape[1:], bound_th)


def match_radius(size: tuple[int, ...], bound_th: float = BOUND_TH) -> int:
    """Return the radius in pixels within which boundaries match, for an image of size (H, W)."""
    if bound_th >= 1 and bound_th == int(bound_th):
        return int(bound_th)
    if not 0 <= bound_th < 1:
        raise ValueError(f"bound_th must be in [0, 1) or a whole number, not {bound_th}")
    return int(np.ceil(bound_th * np.linalg.norm(size)))


def _as_videos(gt: np.ndarray, pred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if gt.shape != pred.shape:
        raise ValueError(f"masks of different shapes: {gt.shape} and {pred.shape}")
    if gt.ndim not in (2, 3) or 0 in gt.shape[-2:]:
        raise ValueError(f"masks must be [H, W] or [T, H, W], not of shape {gt.shape}")
    return (gt, pred) if gt.ndim == 3 else (gt[None], pred[None])


def _pack(masks_thw: np.ndarray) -> np.ndarray:
    """Return uint64 [T, H, ceil(W / 64)]: pixel x is bit x % 64 of word x // 64; padding is 0."""
    octets = np.packbits(masks_thw.astype(bool, copy=False), axis=-1, bitorder="little")
    short = -octets.shape[-1] % 8
    if short:
        octets = np.pad(octets, ((0, 0), (0, 0), (0, short)))
    return octets.view("<u8")


def _area(bits: np.ndarray) -> int:
    """Return the number of set pixels."""
    return int(np.bitwise_count(bits).sum(dtype=np.int64))


def _score(
    gt_bits: np.ndarray, pred_bits: np.ndarray, size: tuple[int, ...], bound_th: float
) -> tuple[np.ndarray, np.ndarray]:
    radius = match_radius(size, bound_th)
    union = gt_bits | pred_bits
    rows, columns = union.any(axis=2), np.bitwise_or.reduce(union, axis=1) != 0
    jaccard, boundary = np.ones(len(union)), np.ones(len(union))
    for t in np.flatnonzero(rows.any(axis=1)):
        top, bottom = _span(rows[t])
        left, right = _span(columns[t])
        # words first: shifts and ORs then run over long contiguous memory
        pair = np.empty((right - left, 2, bottom - top), dtype=np.uint64)
        pair[:, 0] = gt_bits[t, top:bottom, left:right].T
        pair[:, 1] = pred_bits[t, top:bottom, left:right].T
        shared, joined = _area(pair[:, 0] & pair[:, 1]), _area(pair[:, 0] | pair[:, 1])
        jaccard[t] = shared / joined
        if shared < joined:
            edges = _boundaries(pair, size[1] if right == union.shape[2] else None)
            boundary[t] = _f_measure(edges, radius)
    return jaccard, boundary


def _span(occupied: np.ndarray) -> tuple[int, int]:
    """Return the smallest [first, last) around all occupied indices, one wider on each side."""
    first, last = int(occupied.argmax()), len(occupied) - int(occupied[::-1].argmax())
    return max(first - 1, 0), min(last + 1, len(occupied))


def _boundaries(pair: np.ndarray, width: int | None) -> np.ndarray:
    """Return the pixels that differ from their right, lower or lower-right neighbour.

    Neighbours beyond the image equal the pixel on its edge: the last row is compared only with the
    right, the last column only with the row below.

    Args:
        pair: Packed masks [w, 2, h]. A window that does not end at the image's edge ends in an
            empty row or word.
        width: The image's width if the window ends at its right edge, else None.
    """
    right = pair >> _ONE
    right[:-1] |= pair[1:] << _CARRY
    if width is not None:
        right[-1] |= pair[-1] & (_ONE << np.uint64((width - 1) % 64))
    edges = pair ^ right
    above = pair[..., :-1]
    edges[..., :-1] |= (above ^ pair[..., 1:]) | (above ^ right[..., 1:])
    return edges


def _f_measure(edges: np.ndarray, radius: int) -> float:
    """Return F of boundary maps [w, 2, h], ground truth first."""
    gt, pred = edges[:, 0], edges[:, 1]
    n_gt, n_pred = _area(gt), _area(pred)
    if n_gt == 0 and n_pred == 0:
        return 1.0
    if n_gt == 0 or n_pred == 0:
        return 0.0
    near = _dilate(edges, radius)
    precision, recall = _area(pred & near[:, 0]) / n_pred, _area(gt & near[:, 1]) / n_gt
    if precision + recall == 0:
        return 0.0
    # same order of operations as the reference, since it decides the last bit
    return 2 * precision * recall / (precision + recall)


@lru_cache(maxsize=64)
def _disk_runs(radius: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return the disk x² + y² <= radius² as (half width, its row offsets), narrowest first."""
    runs: dict[int, list[int]] = {}
    for dy in range(radius, -1, -1):
        runs.setdefault(math.isqrt(radius * radius - dy * dy), []).append(dy)
    return tuple((half, tuple(offsets)) for half, offsets in runs.items())


def _dilate(edges: np.ndarray, radius: int) -> np.ndarray:
    """Return packed maps [w, n, h] dilated by a disk.

    Rows are widened step by step to the half widths of the disk's rows and added at their offsets.
    A step exceeds the half width so far by at most one, so that a run cut by the window's edge
    still overlaps its shifted copy and no gap opens.
    """
    near = np.zeros_like(edges)
    wide, spare = edges.copy(), (np.empty_like(edges), np.empty_like(edges))
    done, height = 0, edges.shape[-1]
    for half, offsets in _disk_runs(radius):
        while done < half:
            step = min(half - done, done + 1, 63)
            _widen(wide, step, *spare)
            done += step
        for dy in offsets:
            if dy == 0:
                near |= wide
            elif dy < height:
                near[..., dy:] |= wide[..., :-dy]
                near[..., :-dy] |= wide[..., dy:]
    return near


def _widen(bits: np.ndarray, step: int, total: np.ndarray, part: np.ndarray) -> None:
    """OR each pixel with those `step` to its left and right, in place, with two spare arrays."""
    shift, carry = np.uint64(step), np.uint64(64 - step)
    np.right_shift(bits, shift, out=total)
    total |= np.left_shift(bits, shift, out=part)
    total[:-1] |= np.left_shift(bits[1:], carry, out=part[1:])
    total[1:] |= np.right_shift(bits[:-1], carry, out=part[1:])
    bits |= total
