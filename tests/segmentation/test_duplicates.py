"""Which objects of a response are segmented."""

from __future__ import annotations

import time

import numpy as np
import pytest

from rcot_rl.segmentation.duplicates import merge_duplicates

BOX = np.array([100.0, 100.0, 200.0, 300.0])


def kept(boxes, points=None, max_objects=32, duplicate_iou=0.9):
    return merge_duplicates(np.array(boxes), points, max_objects, duplicate_iou).tolist()


def test_identical_boxes_are_one_object():
    assert kept([BOX] * 60) == [0]
    assert kept([BOX] * 60, np.full((60, 2), 150.0)) == [0]


@pytest.mark.parametrize(
    ("shift", "n"),
    [(0.0, 1), (5.0, 1), (6.0, 2), (100.0, 2)],  # IoU of two boxes 100 wide: 95/105, 94/106
)
def test_boxes_are_merged_from_the_threshold_on(shift, n):
    assert len(kept([BOX, BOX + np.array([shift, 0, shift, 0])])) == n


@pytest.mark.parametrize(("dx", "dy", "n"), [(9, 0, 1), (11, 0, 2), (0, 19, 1), (0, 21, 2)])
def test_objects_in_one_box_with_distant_points_both_stay(dx, dy, n):
    points = np.array([[150.0, 200.0], [150.0 + dx, 200.0 + dy]])
    assert len(kept([BOX, BOX], points)) == n


def test_the_first_of_duplicates_and_the_first_objects_are_kept():
    boxes = [BOX + 300 * k for k in range(5)]
    order = [0, 0, 1, 0, 1, 2, 3, 4, 2]
    assert kept([boxes[k] for k in order]) == [0, 2, 5, 6, 7]
    assert kept([boxes[k] for k in order], max_objects=3) == [0, 2, 5]


def test_at_a_threshold_of_one_only_equal_objects_are_merged():
    assert kept([BOX, BOX, BOX + 0.01], duplicate_iou=1.0) == [0, 2]


def test_boxes_without_area_and_no_boxes_are_accepted():
    assert kept([[5.0, 5.0, 5.0, 9.0]] * 3, max_objects=2) == [0, 1]
    assert kept(np.zeros((0, 4)), np.zeros((0, 2))) == []


def test_a_hundred_thousand_boxes_take_less_than_a_second():
    boxes = np.tile(BOX, (100_000, 1)) + np.arange(100_000)[:, None] % 50 * 300
    started = time.process_time()
    assert len(merge_duplicates(boxes, boxes[:, :2], 32, 0.9)) == 32
    assert time.process_time() - started < 1
