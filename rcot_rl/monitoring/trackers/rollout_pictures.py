"""Pictures for trackers: a frame, scaled down, with boxes, points and masks that can be toggled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.monitoring.pages.embedded_media import shrunk
from rcot_rl.monitoring.run_files.rollout_figures import verdict_of
from rcot_rl.monitoring.run_files.rollout_files import (
    Box,
    Point,
    Rollout,
    RolloutFrames,
    read_frame,
)
from rcot_rl.monitoring.trackers.tracker import Picture, PictureBox
from rcot_rl.recipe.schema import Recipe
from rcot_rl.segmentation.segmenter import load_segmenter
from rcot_rl.segmentation.segmenter_actor import LocalSegmenter
from reward_fns.components.mask_iou import MaskRequest

logger = logging.getLogger(__name__)

TRUE, PREDICTED, PREDICTED_MASK = "ground truth", "predicted", "predicted mask"
"""Groups of overlays."""
MOST_OBJECTS = 20
"""Objects of a response that are drawn."""

Objects = Sequence[tuple[Box, Point | None]]


def scaled_picture(
    image: np.ndarray,
    longest: int,
    *,
    canvas: tuple[float, float] | None = None,
    objects: Mapping[str, Objects] | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
    caption: str = "",
) -> Picture:
    """Return a frame with overlays, at most `longest` pixels wide and high.

    Args:
        image: uint8 [H, W, 3] RGB.
        longest: Longest side of the picture in pixels; smaller frames keep their size.
        canvas: (width, height) that coordinates refer to. None: the frame's.
        objects: Group -> boxes, each with its point or None. What lies outside the frame is moved
            to its edge.
        masks: Group -> bool [H, W] of the frame.
        caption: Text below the picture.
    """
    height, width = image.shape[:2]
    shown = shrunk(image, longest)
    size = shown.shape[1], shown.shape[0]
    columns, rows = canvas or (width, height)
    factors = size[0] / columns, size[1] / rows
    return Picture(
        shown,
        {
            group: [
                mark for n, one in enumerate(drawn, 1) for mark in _marks(one, n, factors, size)
            ]
            for group, members in (objects or {}).items()
            if (drawn := members[:MOST_OBJECTS])
        },
        {group: _resized(mask, size) for group, mask in (masks or {}).items()},
        caption,
    )


class RolloutPictures:
    """Draws the frames of a stage's rollouts."""

    def __init__(
        self, frames: RolloutFrames, longest: int, segmenter: LocalSegmenter | None = None
    ) -> None:
        """Draw frames of `frames`, at most `longest` pixels wide and high.

        Args:
            segmenter: Makes the masks of predicted boxes.
        """
        self._frames, self._longest, self._segmenter = frames, longest, segmenter
        self._read: tuple[Path, np.ndarray] | None = None

    def picture(
        self, shown: Rollout, others: Mapping[str, Rollout] | None = None, *, masked: bool = False
    ) -> Picture | None:
        """Return the frame of a response; None if it is missing.

        That of an agentic episode is the frame that it judged last.

        Args:
            shown: The response; its objects are the group `predicted`, unless `others` is given.
            others: Group -> response to the same prompt, to show in its place.
            masked: Add the segmenter's mask of the predicted boxes.
        """
        path = self._path(shown)
        image = self._image(path) if path is not None else None
        if path is None or image is None:
            return None
        responses = others or {PREDICTED: shown}
        objects = {TRUE: shown.true_objects}
        objects |= {group: one.predicted_objects for group, one in responses.items()}
        masks = {}
        if masked and self._segmenter is not None:
            masks = self._masks(path, responses)
        height, width = image.shape[:2]
        canvas = self._frames.canvas
        return scaled_picture(
            image,
            self._longest,
            canvas=(canvas, canvas) if canvas else (width, height),
            objects=objects,
            masks=masks,
            caption=_caption(shown, responses),
        )

    def _path(self, shown: Rollout) -> Path | None:
        judged = shown.outcome.get("judged")
        if isinstance(judged, int):
            return self._frames.clip_path(shown.index, judged)
        return self._frames.path(shown.index)

    def _image(self, path: Path) -> np.ndarray | None:
        if self._read is None or self._read[0] != path:
            image = read_frame(path)
            if image is None:
                return None
            self._read = (path, image)
        return self._read[1]

    def _masks(self, path: Path, responses: Mapping[str, Rollout]) -> dict[str, np.ndarray]:
        masks = {}
        for group, response in responses.items():
            objects = response.predicted_objects[:MOST_OBJECTS]
            if not objects:
                continue
            boxes, points = [box for box, _ in objects], [point for _, point in objects]
            request = MaskRequest([str(path)], 0, boxes, points, self._frames.canvas)
            try:
                name = PREDICTED_MASK if group == PREDICTED else f"{group} mask"
                masks[name] = self._segmenter.union_masks([request])[0][0]  # type: ignore[union-attr]
            except InputError as error:
                logger.warning("no mask for a picture: %s", error)
        return masks


def mask_maker(recipe: Recipe | None) -> LocalSegmenter | None:
    """Return the recipe's segmenter on the CPU, loaded with the first picture; None if unwanted."""
    if recipe is None or not recipe.tracking.picture_masks:
        return None
    return LocalSegmenter(partial(load_segmenter, recipe.models.segmenter, "cpu", recipe.segmenter))


def _marks(
    target: tuple[Box, Point | None],
    number: int,
    factors: tuple[float, float],
    size: tuple[int, int],
) -> list[PictureBox]:
    """Return an object's box and point, in pixels of the picture."""
    box, point = target
    marks = [PictureBox(_moved(box, factors, size), f"object {number}")]
    if point is not None:
        marks.append(PictureBox(_moved((*point, *point), factors, size), f"point {number}"))
    return marks


def _moved(box: Box, factors: tuple[float, float], size: tuple[int, int]) -> Box:
    x1, y1, x2, y2 = (
        min(max(value * factors[i % 2], 0.0), float(size[i % 2])) for i, value in enumerate(box)
    )
    return x1, y1, x2, y2


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0


def _caption(shown: Rollout, responses: Mapping[str, Rollout]) -> str:
    """Return the truth and the responses in a few words."""
    rewards = ", ".join(f"{group} {one.reward:g}" for group, one in responses.items())
    if shown.task == "aks":
        verdicts = ", ".join(verdict_of(one) or "none" for one in responses.values())
        rounds = shown.outcome.get("judgements")
        judged = f", last of {rounds} judgements" if isinstance(rounds, int) else ""
        return f"truth {shown.truth}, answered {verdicts}{judged}; reward: {rewards}"
    return f"true objects: {len(shown.true_objects)}; reward: {rewards}"
