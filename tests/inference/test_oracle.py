"""Upper bounds: keyframes, boxes and points from the ground truth, against values by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.corpora.corpus import Corpus, CorpusFault, Expression, Video
from rcot_rl.inference.oracle import Oracle
from rcot_rl.inference.pipeline import VideoReasoner
from rcot_rl.inference.policy import PolicyResponse
from rcot_rl.inference.predict import Target, trace_video, video_clip
from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.recipe.inference_section import FIRST_FRAME, ORACLES, PredictSection
from rcot_rl.recipe.schema import CanvasSection

CANVAS = CanvasSection(image=112, video=56)
HEIGHT, WIDTH = 28, 56
RECTANGLES = {
    "1": {1: (8, 4, 20, 12), 2: (0, 0, 20, 20), 4: (10, 0, 30, 20)},
    "2": {2: (0, 0, 20, 20), 3: (40, 10, 41, 11)},
}
"""Object id -> frame -> half-open box of its mask. Object 2 covers object 1 in frame 2."""


class Rectangles(Corpus):
    """One video of five frames; the masks in `lost` are missing."""

    dataset, splits = "rectangles", ("valid",)
    has_masks = True
    expressions_file = Path("rectangles.json")
    frames_root = Path("JPEGImages")

    def __init__(self, lost=()):
        super().__init__(Path("."), "valid")
        self.lost = lost

    def _read_videos(self):
        expressions = (
            Expression("one", "one", ("1",), ("1",)),
            Expression("both", "both", ("1", "2"), ("1", "2")),
            Expression("two", "two", ("2",), ("2",)),
            Expression("none", "none", ()),
            Expression("unknown", "unknown", (), unlabelled=True),
        )
        return [Video("v", tuple("abcde"), expressions)]

    def object_mask(self, video_id, anno_id, frame_index):
        if frame_index in self.lost:
            raise CorpusFault("missing_mask", f"{frame_index}.png")
        if frame_index not in RECTANGLES[anno_id]:
            return None
        x1, y1, x2, y2 = RECTANGLES[anno_id][frame_index]
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[y1:y2, x1:x2] = True
        return mask

    def frame_size(self, video_id, frame):
        return HEIGHT, WIDTH

    def frame(self, video_id, frame):
        return np.full((HEIGHT, WIDTH, 3), "abcde".index(frame), np.uint8)


class Scripted:
    """Choose frame 1, accept it, and answer one wrong box."""

    def __init__(self):
        self.asked = []

    async def generate(self, request, sampling, started=None):
        if started is not None:
            started.set()
        frame = None if request.image is None else int(request.image[0, 0, 0])
        task, text = self._respond(request.text)
        self.asked.append((task, frame))
        return [PolicyResponse(text)]

    def _respond(self, text):
        if "best frame" in text:
            return "kfg", "<answer>1</answer>"
        if "A or B" in text:
            return "aks", "<think>.</think><answer>A</answer>"
        if "boxes" in text:
            return (
                "ktg",
                '<think>.</think><answer>[{"bbox_2d": [1, 1, 3, 3], "point_2d": [2, 2]}]</answer>',
            )
        return "vdg", "grey"

    def count_tokens(self, text):
        return len(text.split())

    def most_frames(self, side, text_tokens):
        return 100


def oracle(expression, variant="oracle-both", corpus=None):
    corpus = corpus or Rectangles()
    video = corpus.video("v")
    return Oracle.of(variant, corpus, video, corpus.expression(video, expression), CANVAS.image)


def traced(variant, expression, corpus=None):
    """Return the trace of a prediction (or why there is none), and the requests."""
    corpus, policy = corpus or Rectangles(), Scripted()
    video = corpus.video("v")

    async def run():
        clip = video_clip(corpus, video)
        reasoner = VideoReasoner(clip, policy, load_prompts("compact"), CANVAS)
        settings = {variant: PredictSection().reasoning(variant)}
        targets = [Target(expression, variant, "unused")]
        return await trace_video(corpus, video, targets, reasoner, settings)

    (one,) = asyncio.run(run())
    return one.trace or one.fault, policy.asked


@pytest.mark.parametrize(
    ("expression", "frame"),
    [
        ("one", 2),  # 400 pixels, as in frame 4
        ("both", 2),  # the union has 400 pixels; the sum of the areas is not the measure
        ("two", 2),
        ("none", 0),
    ],
)
def test_true_keyframe_has_the_first_largest_union(expression, frame):
    assert oracle(expression).keyframe() == frame


def test_frames_without_ground_truth_are_never_the_keyframe():
    assert oracle("one", corpus=Rectangles(lost=(2,))).keyframe() == 4


def test_true_objects_are_tight_boxes_and_inner_points_on_the_canvas():
    """A frame has 56 x 28 pixels, the canvas 112 x 112: x is doubled, y is multiplied by 4."""
    frame, (one,) = oracle("one").objects(1)
    assert frame == 1
    assert one.bbox_2d == (16, 16, 40, 48)
    # 12 x 8 pixels: the first of the innermost ones is (11, 7), its centre (11.5, 7.5)
    assert one.point_2d == (23, 30)
    assert [o.bbox_2d for o in oracle("both").objects(2)[1]] == [(0, 0, 40, 80)] * 2
    assert oracle("two").objects(1) == (1, [])
    assert oracle("none").objects(3) == (3, [])


def test_boxes_come_from_the_nearest_frame_with_ground_truth():
    corpus = Rectangles(lost=(1, 2))
    assert oracle("one", corpus=corpus).objects(1)[0] == 0
    assert oracle("one", corpus=corpus).objects(2)[0] == 3
    trace, _ = traced("oracle-boxes", "one", corpus)
    assert (trace.initial_keyframe, trace.keyframe) == (1, 0)
    assert trace.faults == ["oracle:other_frame"] and trace.boxes_source == []


@pytest.mark.parametrize("variant", ORACLES)
def test_without_any_ground_truth_there_is_no_prediction(variant):
    for expression, lost in (("unknown", ()), ("one", range(5))):
        fault, _ = traced(variant, expression, Rectangles(lost))
        assert fault == (
            f"rectangles.json: videos.v.expressions.{expression}: no frame has usable ground truth"
        )


def test_oracle_keyframe_grounds_on_the_true_keyframe():
    trace, asked = traced("oracle-keyframe", "one")
    assert asked == [("vdg", None), ("ktg", 2)]
    assert (trace.keyframe, trace.initial_keyframe, trace.rounds) == (2, 2, 0)
    assert trace.boxes_canvas == [[1, 1, 3, 3]]


def test_oracle_boxes_keeps_the_policys_keyframe():
    trace, asked = traced("oracle-boxes", "one")
    assert asked == [("vdg", None), ("kfg", None), ("aks", 1)]
    assert trace.keyframe == 1
    assert trace.boxes_source == [[8, 4, 20, 12]]
    assert trace.points_source == [[11.5, 7.5]]


def test_oracle_both_asks_nothing():
    trace, asked = traced("oracle-both", "both")
    assert asked == [] == trace.steps
    assert trace.keyframe == 2 and trace.boxes_source == [[0, 0, 20, 20]] * 2
    nothing, _ = traced("oracle-both", "none")
    assert nothing.boxes_source == [] and nothing.faults == []


@pytest.mark.parametrize("variant", [None, FIRST_FRAME])
def test_other_predictions_see_no_ground_truth(variant):
    assert oracle("one", variant) is None
    trace, _ = traced(variant, "one")
    assert trace.keyframe == (0 if variant else 1)
    assert trace.boxes_canvas == [[1, 1, 3, 3]]
