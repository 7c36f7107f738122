"""A request on its way to the engine."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from rcot_rl.inference.batch import prepare


@pytest.fixture
def row(tmp_path):
    """Return a request about five frames, each of a different colour."""
    paths = []
    for k in range(5):
        paths.append(tmp_path / f"{k}.jpg")
        cv2.imwrite(str(paths[k]), np.full((40, 60, 3), 50 * k, np.uint8))
    sampling = json.dumps({"logit_bias": {"5": -100}, "max_tokens": 64})
    frames = [str(p) for p in paths]
    fixed = {"key": "k", "prompt": "p", "canvas": 28, "media": "video", "fps": 2.0}
    return fixed | {"frames": frames, "sampling": sampling}


def colours(ready: dict) -> list[int]:
    return [round(float(frame.mean()) / 50) for frame in ready["multimodal_data"]["video"]]


@pytest.mark.parametrize(
    ("broken", "shown"),
    [
        ((), [0, 1, 2, 3, 4]),
        ((0,), [1, 1, 2, 3, 4]),
        ((2, 4), [0, 1, 1, 3, 3]),
        ((0, 1, 3, 4), [2, 2, 2, 2, 2]),
    ],
)
def test_a_frame_that_does_not_decode_is_replaced_by_the_nearest(row, broken, shown):
    for k in broken:
        open(row["frames"][k], "wb").close()
    ready = prepare(row)
    assert ready["readable"] and colours(ready) == shown
    assert ready["sampling_params"]["max_tokens"] == 64


def test_a_request_without_a_readable_frame_is_unreadable(row):
    for path in row["frames"]:
        open(path, "wb").close()
    ready = prepare(row)
    assert not ready["readable"]
    assert ready["multimodal_data"]["video"].shape == (5, 28, 28, 3)
    assert ready["sampling_params"]["max_tokens"] == 1
