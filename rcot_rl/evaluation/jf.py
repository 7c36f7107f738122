"""Region similarity J and boundary accuracy F, equal to the DAVIS 2017 reference to the last bit.

J is the intersection over the union. F is the harmonic mean of precision and recall of boundary
pixels; a pixel matches within a disk of radius ceil(0.008 · image diagonal).

Edge cases, as in the reference: J = 1 if both masks are empty; F = 1 if neither has a boundary (so
a full frame against an empty one has J = 0 and F = 1) and 0 if only one has none.

A mask is cut into eight horizontal strips, one per bit of a byte. Neighbouring pixels then lie in
neighbouring bytes, so that a boundary takes a few XORs of shifted views and a dilation a few ORs,
each for eight pixels per byte. Only the columns around both masks are processed.
Left out: the reference's recall and decay statistics over a sequence.
"""

from __future__ import annotations

import math

import numpy as np

BOUND_TH = 0.008
"""Share of the image diagonal within which boundaries match."""

_STRIPS = 8
"""Strips of a mask: the bits of a byte."""


def region_similarity(gt: np.ndarray, pred: np.ndarray) -> float | np.ndarray:
    """Return J of two masks or of each frame of two videos. Raises ValueError.

    Args:
        gt: Ground truth, [H, W] or [T, H, W]; any non-zero pixel is foreground.
        pred: Prediction of the same shape.

    Returns:
        A float for masks, float64 [T] for videos.
    """
    frames = zip(*_as_videos(gt, pred), strict=True)
    scores = np.array([_jaccard(_pack(g, p, margin=1)[0]) for g, p in frames])
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
    height, width = gt_thw.shape[1:]
    # a disk with this radius covers the image from any pixel
    radius = min(match_radius((height, width), bound_th), height + width)
    margin = max(radius, 1)
    jaccard, boundary = np.ones(len(gt_thw)), np.ones(len(gt_thw))
    for t, (gt, pred) in enumerate(zip(gt_thw, pred_thw, strict=True)):
        octets, columns = _pack(gt, pred, margin)
        jaccard[t] = _jaccard(octets)
        if jaccard[t] < 1:
            boundary[t] = _f_measure(_boundaries(octets, (height, columns), margin), radius, margin)
    return jaccard, boundary


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


def _pack(gt: np.ndarray, pred: np.ndarray, margin: int) -> tuple[np.ndarray, int]:
    """Pack two masks [H, W] and cut out the columns around both, one wider on each side.

    Returns:
        uint8 [2, margin + n + margin, stride]: bit k of byte (y, x) is pixel (k · n + y, x), with y
            counted from the end of the upper margin. Margins and at least `margin` bytes at the end
            of a row are 0; `stride` is a multiple of 8.
        Number of columns cut out.
    """
    height, width = gt.shape
    n = max(-(-height // _STRIPS), margin)
    packed = np.zeros((2, n, width), dtype=np.uint8)
    for mask, octets in zip((gt, pred), packed, strict=True):
        # bytes of a boolean array may be neither 0 nor 1: Pillow's are 255
        pixels = np.not_equal(mask, False).view(np.uint8)
        for k in reversed(range(_STRIPS)):
            strip = pixels[k * n : (k + 1) * n]
            octets += octets
            octets[: len(strip)] |= strip
    occupied = np.flatnonzero(np.bitwise_or.reduce(packed.reshape(2 * n, width)))
    window = slice(max(occupied[0] - 1, 0), occupied[-1] + 2) if occupied.size else slice(0)
    cut = packed[..., window]
    columns = cut.shape[2]
    stride = -(-(columns + margin) // 8) * 8
    framed = np.zeros((2, n + 2 * margin, stride), dtype=np.uint8)
    framed[:, margin:-margin, :columns] = cut
    return framed, columns


def _area(octets: np.ndarray) -> int:
    """Return the number of set pixels; the last dimension is a multiple of 8."""
    return int(np.bitwise_count(octets.view(np.uint64)).sum(dtype=np.int64))


def _jaccard(octets: np.ndarray) -> float:
    shared, joined = _area(octets[0] & octets[1]), _area(octets[0] | octets[1])
    return shared / joined if joined else 1.0


def _boundaries(octets: np.ndarray, size: tuple[int, int], margin: int) -> np.ndarray:
    """Return the pixels that differ from their right, lower or lower-right neighbour.

    Neighbours beyond the image equal the pixel on its edge: the last row is compared only with the
    right, the last column only with the row below.

    Args:
        octets: Packed masks. Neighbours beyond the image are written into them.
        size: (image's height, columns of the window).
        margin: Rows of a margin.

    Returns:
        The same shape. A strip's margins hold the rows of the strips above and below.
    """
    height, columns = size
    stride = octets.shape[2]
    strip, row = divmod(height - 1, octets.shape[1] - 2 * margin)
    last, below = np.uint8(1 << strip), margin + row + 1
    octets[:, -margin] = octets[:, margin] >> 1
    octets[:, below] |= octets[:, below - 1] & last
    octets[:, :, columns] = octets[:, :, columns - 1]
    edges = np.zeros_like(octets)
    flat, out = octets.reshape(-1), edges.reshape(-1)[: -stride - 1]
    pixels = flat[: -stride - 1]
    np.bitwise_xor(pixels, flat[1:-stride], out=out)
    out |= pixels ^ flat[stride:-1]
    out |= pixels ^ flat[stride + 1 :]
    edges[:, below] &= ~last
    edges[:, :, columns:] = 0
    edges[:, :margin] = edges[:, -2 * margin : -margin] << 1
    edges[:, -margin:] = edges[:, margin : 2 * margin] >> 1
    return edges


def _f_measure(edges: np.ndarray, radius: int, margin: int) -> float:
    """Return F of packed boundaries, ground truth first."""
    gt, pred = edges[:, margin:-margin]
    n_gt, n_pred = _area(gt), _area(pred)
    if n_gt == 0 and n_pred == 0:
        return 1.0
    if n_gt == 0 or n_pred == 0:
        return 0.0
    near_gt, near_pred = _dilate(edges, radius)[:, margin:-margin]
    precision, recall = _area(pred & near_gt) / n_pred, _area(gt & near_pred) / n_gt
    if precision + recall == 0:
        return 0.0
    # same order of operations as the reference, since it decides the last bit
    return 2 * precision * recall / (precision + recall)


def _dilate(edges: np.ndarray, radius: int) -> np.ndarray:
    """Return packed boundaries dilated by a disk; margins and ends of rows are undefined."""
    stride = edges.shape[2]
    near = np.zeros_like(edges)
    first = radius * stride
    out = near.reshape(-1)[first : near.size - first]
    run, length = edges.reshape(-1), 1  # run[i]: the OR of `length` bytes from i
    for dy in range(radius, -1, -1):
        half = math.isqrt(radius * radius - dy * dy)
        while length < 2 * half + 1:
            step = min(2 * half + 1 - length, length)
            run = run[:-step] | run[step:]
            length += step
        for row in {radius - dy, radius + dy}:
            start = row * stride - half
            out |= run[start : start + out.size]
    return near
