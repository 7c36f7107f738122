"""Overlays lie on the pixels that they mark, also after a picture was scaled."""

from __future__ import annotations

import numpy as np
import pytest

from rcot_rl.monitoring.trackers.rollout_pictures import scaled_picture

HEIGHT, WIDTH = 120, 200


@pytest.fixture
def frame():
    """A black frame with a white rectangle from (40, 20) to (100, 80)."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[20:80, 40:100] = 255
    return image


@pytest.mark.parametrize("longest", [1000, 200, 100, 50])
@pytest.mark.parametrize("canvas", [None, (840, 840)])
def test_box_point_and_mask_lie_on_the_marked_pixels(frame, longest, canvas):
    columns, rows = canvas or (WIDTH, HEIGHT)
    x, y = columns / WIDTH, rows / HEIGHT
    box = (40 * x, 20 * y, 100 * x, 80 * y)
    picture = scaled_picture(
        frame,
        longest,
        canvas=canvas,
        objects={"true": [(box, (70 * x, 50 * y))]},
        masks={"true": frame[..., 0] > 0},
    )
    assert max(picture.image.shape[:2]) == min(longest, WIDTH)
    assert picture.masks["true"].shape == picture.image.shape[:2]
    marked, point = picture.boxes["true"]
    x1, y1, x2, y2 = (round(v) for v in marked.corners)
    bright = picture.image[..., 0] > 127
    expected = np.zeros_like(bright)
    expected[y1:y2, x1:x2] = True
    assert np.array_equal(bright, expected)
    assert np.array_equal(picture.masks["true"], expected)
    assert point.corners[:2] == point.corners[2:]
    assert bright[round(point.corners[1]), round(point.corners[0])]


def test_marks_outside_the_frame_move_to_its_edge(frame):
    objects = {"predicted": [((-50.0, 10.0, 1e12, 30.0), (500.0, -3.0))]}
    box, point = scaled_picture(frame, 100, objects=objects).boxes["predicted"]
    assert box.corners == (0, 5, 100, 15)
    assert point.corners == (100, 0, 100, 0)


def test_thousands_of_boxes_are_not_drawn(frame):
    objects = {"predicted": [((0.0, 0.0, 10.0, 10.0), None)] * 5000, "true": []}
    boxes = scaled_picture(frame, 100, objects=objects).boxes
    assert len(boxes["predicted"]) <= 50
    assert "true" not in boxes
