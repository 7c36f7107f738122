"""TensorBoard's own reader finds what the tracker wrote."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rcot_rl.monitoring.judgement.alert import Alert
from rcot_rl.monitoring.trackers.tensorboard_tracker import TensorBoardTracker
from rcot_rl.monitoring.trackers.tracker import (
    DataTable,
    Distribution,
    Picture,
    PictureBox,
    TrackedStage,
)


@pytest.fixture
def stage(tmp_path):
    return TrackedStage(tmp_path, "abc", "laptop", "grpo-ktg", "grpo", {"seed": 1})


def read(tmp_path) -> EventAccumulator:
    events = EventAccumulator(str(tmp_path / "tracking" / "tensorboard" / "grpo-ktg"))
    return events.Reload()


def picture() -> Picture:
    image = np.full((40, 60, 3), 90, np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[30:, :5] = True
    boxes = {
        "ground truth": [PictureBox((5, 5, 25, 25), "box")],
        "predicted": [PictureBox((50, 10, 50, 10), "point")],
    }
    return Picture(image, boxes, {"segmenter": mask})


def test_scalars_pictures_tables_and_distributions_are_read_back(tmp_path, stage):
    tracker = TensorBoardTracker()
    assert tracker.open(stage) == 0
    for step in (1, 2, 3):
        tracker.log(step, {"reward/mean": step / 4, "time": 1e9 + step})
    table = DataTable(["picture", "reward"], [[picture(), 0.5], [None, 1.25]])
    tracker.log(4, {"rollouts": table, "lengths": Distribution([0, 10, 20], [3, 1])})
    tracker.summarize({"heldout": 2.5})
    tracker.alert(Alert("hang", "error", "grpo-ktg", 4, "A hang", "No step for 600 s."))
    tracker.close("done")
    events = read(tmp_path)
    scalars = events.Scalars("reward/mean")
    assert [(s.step, s.value, s.wall_time) for s in scalars] == [
        (1, 0.25, 1e9 + 1),
        (2, 0.5, 1e9 + 2),
        (3, 0.75, 1e9 + 3),
    ]
    assert "time" not in events.Tags()["scalars"]
    assert events.Scalars("summary/heldout")[0].value == 2.5
    histogram = events.Histograms("lengths")[0].histogram_value
    assert list(histogram.bucket) == [3, 1] and histogram.num == 4
    tensors = events.Tags()["tensors"]
    assert {"config", "rollouts", "alerts/hang"} <= set(tensors)
    markdown = events.Tensors("rollouts")[0].tensor_proto.string_val[0].decode()
    assert "| picture 0 | 0.5 |" in markdown and "1.25" in markdown
    image = np.asarray(Image.open(io.BytesIO(events.Images("rollouts/0")[0].encoded_image_string)))
    assert image.shape == (40, 60, 3)
    assert tuple(image[5, 15]) == (0, 255, 0) and tuple(image[10, 50]) == (255, 0, 0)
    assert tuple(image[35, 2]) != (90, 90, 90), "the mask is tinted"


def test_a_stage_that_is_opened_again_has_each_step_once(tmp_path, stage):
    tracker = TensorBoardTracker()
    for last in (3, 5):
        assert tracker.open(stage) == 0
        for step in range(1, last + 1):
            tracker.log(step, {"reward/mean": float(last)})
        tracker.close("running")
    assert [s.step for s in read(tmp_path).Scalars("reward/mean")] == [1, 2, 3, 4, 5]
    assert "tensorboard --logdir" in tracker.where()
