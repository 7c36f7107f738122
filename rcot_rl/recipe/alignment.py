"""The recipe's section on masks that belong to another frame (`data.alignment`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rcot_rl.recipe.base import Section


class AlignmentSection(Section):
    """How hard to look for misplaced labels; each level includes the ones before."""

    level: Literal["off", "frames", "sam2"] = "off"
    """`frames`: do an object's masks fit their own frames better than other frames, and their own
    place better than one beside it? `sam2`: does SAM2, from the keyframe's box, find the labels of
    other frames?"""

    frames: int = Field(default=16, ge=4, le=64)
    """Frames of a video that are looked at, evenly spaced."""

    gain: float = Field(default=0.15, gt=0)
    """How much better another order of frames must fit, relative to the labels' own."""

    agreement: float = Field(default=0.7, gt=0.5, le=1)
    """Least share of an object's masks that must fit the other order better."""

    drift: float = Field(default=0.05, gt=0)
    """Least displacement of masks from what they outline, as a share of the frame's longer side."""

    min_iou: float = Field(default=0.3, gt=0, lt=1)
    """`sam2`: least mean IoU of SAM2's masks with the labels."""
