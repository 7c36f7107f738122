"""Masks without weights: GrabCut in the keyframe's box, propagated by optical flow.

Replaces SAM2 (eq. 7 of the paper) where no weights are available; needs only OpenCV. Each further
frame warps its neighbour's mask along DIS flow, then segments a band around the outline again. A
warped mask is shown only while its colours are closer to the object than to the rest of the
keyframe. So an object that leaves the frame has an empty mask, and reappears if it returns to about
the same position. It relies on colour: good on clean shapes, far below SAM2 on natural video.
Deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from rcot_rl.segmentation.clip_frames import FrameSequence
from rcot_rl.segmentation.segmenter import FLOW_NAME, FrameMasks, no_masks

CUT_ITERATIONS = 4
BAND = 7  # px; how far a refined outline may move from the warped one
MIN_PIXELS = 20  # smaller masks are warped without refinement: too little data for GrabCut
POINT_RADIUS = 2


class FlowSegmenter:
    """GrabCut and DIS optical flow; a `VideoSegmenter`."""

    name = FLOW_NAME
    identity = f"{FLOW_NAME}, OpenCV {cv2.__version__}"

    def segment(
        self,
        frames: FrameSequence,
        key: int,
        boxes_source: np.ndarray,
        points_source: np.ndarray | None,
    ) -> Iterator[FrameMasks]:
        """Yield masks; arguments and order as in `VideoSegmenter.segment`."""
        if len(boxes_source) == 0:
            yield from no_masks(frames, key)
            return
        image = frames[key]
        points = [None] * len(boxes_source) if points_source is None else points_source
        prompted = np.stack(
            [cut_box(image, box, p) for box, p in zip(boxes_source, points, strict=True)]
        )
        yield key, prompted
        models = [ColorModel(image, mask) for mask in prompted]
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        for order in (range(key + 1, len(frames)), range(key - 1, -1, -1)):
            carried, before = list(prompted), grey
            for t in order:
                image, masks = frames[t], np.zeros_like(prompted)
                now = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
                move = _flow(now, before)
                for index, model in enumerate(models):
                    moved = refine(image, _warp(carried[index], move), model)
                    if model.fits(image, moved):
                        masks[index] = carried[index] = moved
                yield t, masks
                before = now


class ColorModel:
    """Colour histograms of an object and of the rest of the frame in which its mask is given."""

    def __init__(self, image: np.ndarray, mask: np.ndarray) -> None:
        bins = _bins(image)
        self.inside = _histogram(bins[mask])
        self.outside = _histogram(bins[~mask])

    def agrees(self, image: np.ndarray) -> np.ndarray:
        """Return bool `[H, W]`: pixels whose colour is at least as common in the object."""
        return (self.inside >= self.outside)[_bins(image)]

    def fits(self, image: np.ndarray, mask: np.ndarray) -> bool:
        """Return True if `image` under `mask` is closer to the object (Bhattacharyya)."""
        masked = np.sqrt(_histogram(_bins(image)[mask]))
        return bool(masked @ np.sqrt(self.inside) > masked @ np.sqrt(self.outside))


def _bins(image: np.ndarray) -> np.ndarray:
    """Return int `[H, W]` of uint8 `[H, W, 3]`: the bin of each colour, 8 levels per channel."""
    levels = image.astype(np.int64) >> 5
    return (levels[..., 0] * 8 + levels[..., 1]) * 8 + levels[..., 2]


def _histogram(bins: np.ndarray) -> np.ndarray:
    """Return float `[512]`, smoothed over neighbouring bins; its sum is 1, or 0 without pixels."""
    cube = np.bincount(bins, minlength=512).reshape(8, 8, 8) / max(len(bins), 1)
    for axis in range(3):
        wide = np.pad(cube, [(1, 1) if i == axis else (0, 0) for i in range(3)], mode="edge")
        before, middle, after = (wide.take(range(k, k + 8), axis) for k in range(3))
        cube = 0.25 * before + 0.5 * middle + 0.25 * after
    return cube.ravel() / max(cube.sum(), 1e-12)


def cut_box(image: np.ndarray, box: np.ndarray, point: np.ndarray | None) -> np.ndarray:
    """Return the foreground of an image inside a box.

    Args:
        image: uint8 `[H, W, 3]` RGB.
        box: `[4]` x1, y1, x2, y2 in pixels.
        point: `[2]` x, y of a foreground pixel, or None.

    Returns:
        bool `[H, W]`. The whole box if GrabCut keeps less than a tenth of it; empty for a box
        outside the image.
    """
    height, width = image.shape[:2]
    edges = np.nan_to_num(np.asarray(box, float), posinf=1e9, neginf=-1e9)
    x1, x2 = np.clip(np.round(edges[[0, 2]]), 0, width).astype(int)
    y1, y2 = np.clip(np.round(edges[[1, 3]]), 0, height).astype(int)
    inside = np.zeros((height, width), dtype=bool)
    inside[y1:y2, x1:x2] = True
    if not inside.any():
        return inside
    trimap = np.where(inside, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    if point is not None:
        ys, xs = np.ogrid[:height, :width]
        near = (xs - point[0]) ** 2 + (ys - point[1]) ** 2 <= POINT_RADIUS**2
        trimap[near & inside] = cv2.GC_FGD
    margin_y, margin_x = max(8, (y2 - y1) // 2), max(8, (x2 - x1) // 2)
    window = (
        slice(max(y1 - margin_y, 0), min(y2 + margin_y, height)),
        slice(max(x1 - margin_x, 0), min(x2 + margin_x, width)),
    )
    cut = _grab_cut(image, trimap, window, CUT_ITERATIONS)
    return inside if cut.sum() < 0.1 * inside.sum() else cut


def refine(image: np.ndarray, mask: np.ndarray, model: ColorModel) -> np.ndarray:
    """Return `mask` with its outline segmented again within a band of `BAND` px.

    Inner pixels of a colour foreign to the object are undecided too. Otherwise background that the
    object uncovers, and that the flow drags along, becomes part of it two frames later.

    Args:
        image: uint8 `[H, W, 3]` RGB.
        mask: bool `[H, W]`, warped from the neighbouring frame.
    """
    if mask.sum() < MIN_PIXELS:
        return mask
    height, width = mask.shape
    solid = mask.astype(np.uint8)
    kernel = np.ones((BAND, BAND), np.uint8)
    trimap = np.full(mask.shape, cv2.GC_BGD, np.uint8)
    trimap[cv2.dilate(solid, kernel) > 0] = cv2.GC_PR_BGD
    agrees = model.agrees(image)
    trimap[mask & agrees] = cv2.GC_PR_FGD
    trimap[(cv2.erode(solid, kernel) > 0) & agrees] = cv2.GC_FGD
    ys, xs = np.nonzero(mask)
    margin = 2 * BAND
    window = (
        slice(max(ys.min() - margin, 0), min(ys.max() + margin + 1, height)),
        slice(max(xs.min() - margin, 0), min(xs.max() + margin + 1, width)),
    )
    cut = _grab_cut(image, trimap, window, 1)
    return cut if cut.any() else mask


def _grab_cut(
    image: np.ndarray, trimap: np.ndarray, window: tuple[slice, slice], iterations: int
) -> np.ndarray:
    """Return bool `[H, W]`; the trimap's foreground if one side has too few pixels to model."""
    labels = np.ascontiguousarray(trimap[window])
    foreground = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    if min(foreground.sum(), (~foreground).sum()) >= MIN_PIXELS:
        cv2.setRNGSeed(0)  # GrabCut's k-means starts from OpenCV's global generator
        background_model, object_model = np.zeros((1, 65)), np.zeros((1, 65))
        crop = np.ascontiguousarray(image[window])
        cv2.grabCut(
            crop,
            labels,
            (0, 0, 0, 0),
            background_model,
            object_model,
            iterations,
            cv2.GC_INIT_WITH_MASK,
        )
        foreground = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    out = np.zeros(trimap.shape, dtype=bool)
    out[window] = foreground
    return out


def _flow(now: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return float32 `[H, W, 2]` dx, dy from each pixel of `now` to `before`, uint8 `[H, W]`."""
    if min(now.shape) < 16:  # DIS needs a pyramid of 8 px patches
        return np.zeros((*now.shape, 2), np.float32)
    solver = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = np.zeros((*now.shape, 2), np.float32)
    return np.asarray(solver.calc(now, before, flow))


def _warp(mask: np.ndarray, move: np.ndarray) -> np.ndarray:
    """Return bool `[H, W]`: the mask along the flow `move`, float32 `[H, W, 2]`."""
    height, width = mask.shape
    xs, ys = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    moved = cv2.remap(
        mask.astype(np.float32), xs + move[..., 0], ys + move[..., 1], cv2.INTER_LINEAR
    )
    return moved > 0.5
