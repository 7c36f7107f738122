"""W&B's objects for the values of trackers: tables, histograms, and images with overlays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rcot_rl.monitoring.trackers.tracker import (
    DataTable,
    Distribution,
    Picture,
    PictureBox,
    Value,
)

if TYPE_CHECKING:
    import wandb

POINT_PIXELS = 3.0
"""Half the side of the box that shows a point; W&B has no points."""


class WandbValues:
    """Converts values; a group of overlays has the same class in all pictures."""

    def __init__(self) -> None:
        self._classes: dict[str, int] = {}

    def converted(self, value: Value) -> Any:
        """Return what `wandb.Run.log` takes for a value."""
        import wandb

        if isinstance(value, Distribution):
            return wandb.Histogram(np_histogram=(np.asarray(value.counts), np.asarray(value.edges)))
        if isinstance(value, Picture):
            return self._image(value)
        if isinstance(value, DataTable):
            rows = [
                [self._image(cell) if isinstance(cell, Picture) else cell for cell in row]
                for row in value.rows
            ]
            return wandb.Table(
                columns=list(value.columns), data=rows, allow_mixed_types=_is_mixed(rows)
            )
        return value

    def _image(self, picture: Picture) -> wandb.Image:
        import wandb

        boxes = {
            group: {
                "box_data": [self._box(group, box) for box in members],
                "class_labels": {self._class(group): group},
            }
            for group, members in picture.boxes.items()
        }
        masks = {
            group: {
                "mask_data": mask.astype("uint8") * self._class(group),
                "class_labels": {self._class(group): group},
            }
            for group, mask in picture.masks.items()
        }
        return wandb.Image(
            picture.image,
            caption=picture.caption or None,
            boxes=boxes or None,
            masks=masks or None,
            file_type="jpg",
        )

    def _class(self, group: str) -> int:
        return self._classes.setdefault(group, len(self._classes) + 1)

    def _box(self, group: str, box: PictureBox) -> dict[str, Any]:
        x1, y1, x2, y2 = map(float, box.corners)
        if (x1, y1) == (x2, y2):
            x1, y1 = x1 - POINT_PIXELS, y1 - POINT_PIXELS
            x2, y2 = x2 + POINT_PIXELS, y2 + POINT_PIXELS
        return {
            "position": {"minX": x1, "minY": y1, "maxX": x2, "maxY": y2},
            "domain": "pixel",
            "class_id": self._class(group),
            "box_caption": box.label,
        }


def _is_mixed(rows: Sequence[Sequence[Any]]) -> bool:
    """Return True if a column has values of several types; W&B has one type for numbers."""
    for column in zip(*rows, strict=True):
        kinds = {float if type(v) is int else type(v) for v in column if v is not None}
        if len(kinds) > 1:
            return True
    return False
