"""Masks without weights: GrabCut in the key frame's box, carried by optical flow.

Stands in for SAM2 (eq. 7 of the paper) where none is at hand, with OpenCV alone. Each further frame
takes its neighbour's mask along DIS flow, then cuts a band around its outline anew. What is carried
is shown only while its colours are nearer to the object's than to the rest of the key frame, so an
object that leaves leaves an empty mask, and is seen again if it returns to about that place. It
trusts colour: good on clean shapes, far below SAM2 on natural video. Deterministic.
"""

from __future__ import annotations

import cv2
import numpy as np

CUT_ITERATIONS = 4
BAND = 7  # px: how far a refined outline may move from the warped one
LEAST = 20  # px: smaller masks are carried as they are, GrabCut has too little to learn from
POINT_RADIUS = 2


class FlowSegmenter:
    """GrabCut and DIS optical flow; a `Segmenter`."""

    name = "flow (GrabCut + DIS)"

    def segment(
        self,
        frames_thwc: np.ndarray,
        key: int,
        boxes_source: np.ndarray,
        points_source: np.ndarray | None,
    ) -> np.ndarray:
        """bool [N, T, H, W]; arguments as in `Segmenter.segment`."""
        length, height, width = frames_thwc.shape[:3]
        masks = np.zeros((len(boxes_source), length, height, width), dtype=bool)
        if len(masks) == 0:
            return masks
        points = [None] * len(masks) if points_source is None else points_source
        for index, (box, point) in enumerate(zip(boxes_source, points, strict=True)):
            masks[index, key] = cut_box(frames_thwc[key], box, point)
        looks = [Look(frames_thwc[key], mask[key]) for mask in masks]
        greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames_thwc]
        for step in (1, -1):
            carried = [mask[key] for mask in masks]
            t = key + step
            while 0 <= t < length:
                move = _flow(greys[t], greys[t - step])
                for index, look in enumerate(looks):
                    moved = refine(frames_thwc[t], _warp(carried[index], move), look)
                    if look.fits(frames_thwc[t], moved):
                        masks[index, t] = carried[index] = moved
                t += step
        return masks


class Look:
    """The colours of an object and of all else in the frame where its mask is given."""

    def __init__(self, image: np.ndarray, mask: np.ndarray) -> None:
        bins = _bins(image)
        self.inside = _histogram(bins[mask])
        self.outside = _histogram(bins[~mask])

    def agrees(self, image: np.ndarray) -> np.ndarray:
        """bool [H, W]: pixels whose colour is at least as usual in the object as elsewhere."""
        return (self.inside >= self.outside)[_bins(image)]

    def fits(self, image: np.ndarray, mask: np.ndarray) -> bool:
        """Whether `image` under `mask` is nearer to the object (Bhattacharyya coefficient)."""
        here = np.sqrt(_histogram(_bins(image)[mask]))
        return bool(here @ np.sqrt(self.inside) > here @ np.sqrt(self.outside))


def _bins(image: np.ndarray) -> np.ndarray:
    """int [H, W] of uint8 [H, W, 3]: a colour's place among eight levels a channel."""
    levels = image.astype(np.int64) >> 5
    return (levels[..., 0] * 8 + levels[..., 1]) * 8 + levels[..., 2]


def _histogram(bins: np.ndarray) -> np.ndarray:
    """float [512] that sums to 1 (to 0 of nothing), smoothed against the bins' edges."""
    cube = np.bincount(bins, minlength=512).reshape(8, 8, 8) / max(len(bins), 1)
    for axis in range(3):
        wide = np.pad(cube, [(1, 1) if i == axis else (0, 0) for i in range(3)], mode="edge")
        before, middle, after = (wide.take(range(k, k + 8), axis) for k in range(3))
        cube = 0.25 * before + 0.5 * middle + 0.25 * after
    return cube.ravel() / max(cube.sum(), 1e-12)


def cut_box(image: np.ndarray, box: np.ndarray, point: np.ndarray | None) -> np.ndarray:
    """bool [H, W]: the foreground of `image` inside `box` [4], with `point` [2], if any, in it.

    The whole box where GrabCut keeps less than a tenth of it; nothing for a box outside the image.
    """
    height, width = image.shape[:2]
    edges = np.nan_to_num(np.asarray(box, float), posinf=1e9, neginf=-1e9)
    x1, x2 = np.clip(np.round(edges[[0, 2]]), 0, width).astype(int)
    y1, y2 = np.clip(np.round(edges[[1, 3]]), 0, height).astype(int)
    whole = np.zeros((height, width), dtype=bool)
    whole[y1:y2, x1:x2] = True
    if not whole.any():
        return whole
    trimap = np.where(whole, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    if point is not None:
        ys, xs = np.ogrid[:height, :width]
        near = (xs - point[0]) ** 2 + (ys - point[1]) ** 2 <= POINT_RADIUS**2
        trimap[near & whole] = cv2.GC_FGD
    margin_y, margin_x = max(8, (y2 - y1) // 2), max(8, (x2 - x1) // 2)
    window = (
        slice(max(y1 - margin_y, 0), min(y2 + margin_y, height)),
        slice(max(x1 - margin_x, 0), min(x2 + margin_x, width)),
    )
    found = _grab_cut(image, trimap, window, CUT_ITERATIONS)
    return whole if found.sum() < 0.1 * whole.sum() else found


def refine(image: np.ndarray, mask: np.ndarray, look: Look) -> np.ndarray:
    """bool [H, W]: `mask` with its outline cut anew within a band of `BAND` px.

    Inside, pixels of a colour foreign to the object are open too: else ground that it uncovers, and
    that the flow drags along, is part of it two frames later.
    """
    if mask.sum() < LEAST:
        return mask
    height, width = mask.shape
    solid = mask.astype(np.uint8)
    kernel = np.ones((BAND, BAND), np.uint8)
    trimap = np.full(mask.shape, cv2.GC_BGD, np.uint8)
    trimap[cv2.dilate(solid, kernel) > 0] = cv2.GC_PR_BGD
    agrees = look.agrees(image)
    trimap[mask & agrees] = cv2.GC_PR_FGD
    trimap[(cv2.erode(solid, kernel) > 0) & agrees] = cv2.GC_FGD
    ys, xs = np.nonzero(mask)
    margin = 2 * BAND
    window = (
        slice(max(ys.min() - margin, 0), min(ys.max() + margin + 1, height)),
        slice(max(xs.min() - margin, 0), min(xs.max() + margin + 1, width)),
    )
    found = _grab_cut(image, trimap, window, 1)
    return found if found.any() else mask


def _grab_cut(
    image: np.ndarray, trimap: np.ndarray, window: tuple[slice, slice], iterations: int
) -> np.ndarray:
    """bool [H, W]; the trimap's own foreground where a side has too few pixels to model."""
    labels = np.ascontiguousarray(trimap[window])
    foreground = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    enough = min(foreground.sum(), (~foreground).sum()) >= LEAST
    if enough:
        cv2.setRNGSeed(0)  # GrabCut's k-means starts from OpenCV's global generator
        model = np.zeros((1, 65)), np.zeros((1, 65))
        crop = np.ascontiguousarray(image[window])
        cv2.grabCut(crop, labels, None, *model, iterations, cv2.GC_INIT_WITH_MASK)
        foreground = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    out = np.zeros(trimap.shape, dtype=bool)
    out[window] = foreground
    return out


def _flow(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """float32 [H, W, 2] dx, dy: where each pixel of `now` lies in `before`; both uint8 [H, W]."""
    if min(now.shape) < 16:  # DIS needs a pyramid of 8 px patches
        return np.zeros((*now.shape, 2), np.float32)
    solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return solver.calc(now, before, None)


def _warp(mask: np.ndarray, move: np.ndarray) -> np.ndarray:
    height, width = mask.shape
    xs, ys = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    moved = cv2.remap(
        mask.astype(np.float32), xs + move[..., 0], ys + move[..., 1], cv2.INTER_LINEAR
    )
    return moved > 0.5
