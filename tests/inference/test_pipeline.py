"""The pipeline's rules, with a scripted policy instead of the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.inference.pipeline import NO_DESCRIPTION, Pipeline
from rcot_rl.inference.query_trace import (
    Trace,
    VideoClip,
    VideoQuery,
    as_dict,
    read_objects,
    to_source,
)
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.recipe.inference_section import PredictSection
from rcot_rl.recipe.schema import CanvasSection

PROMPTS = Prompts(
    "scripted",
    {
        "vdg": "vdg|$n_frames",
        "kfg": "kfg|$query|$n_frames|$last_frame",
        "kfg_again": "kfg_again|$query|$n_frames|$rejected|$description",
        "aks": "aks|$query|$description",
        "ktg": "ktg|$query|$description|$canvas",
        "ktg_zero_target": "zero|$query|$description|$canvas",
    },
)
CANVAS = CanvasSection(image=112, video=56)
HEIGHT, WIDTH = 60, 80


class Script:
    """Answer with a function (task, fields, frame index or None) -> text, and record all calls."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []

    def generate(self, requests, sampling):
        responses = []
        for request in requests:
            task, *fields = request.text.split("|")
            if request.image is not None:
                assert request.image.shape == (112, 112, 3)
                frame = int(request.image[0, 0, 0])
            else:
                assert request.video.shape[1:] == (56, 56, 3)
                frame = None
                fields.append(request.video[:, 0, 0, 0].tolist())
            self.calls.append((task, fields, frame))
            responses.append([self.answer(task, fields, frame)] * sampling.n)
        return responses

    def tasks(self):
        return [task for task, _, _ in self.calls]


def clip(n_frames=10, key="v"):
    return VideoClip(key, n_frames, lambda i: np.full((HEIGHT, WIDTH, 3), i, np.uint8))


def tagged(answer):
    return f"<think>so</think><answer>{answer}</answer>"


KTG = tagged('[{"bbox_2d": [28, 28, 56, 84], "point_2d": [42, 56]}]')


def answers(kfg="3", aks=lambda frame: "A", again=lambda rejected: "0", ktg=KTG):
    def answer(task, fields, frame):
        if task == "vdg":
            return " A cat sits. "
        if task == "kfg":
            return tagged(kfg)
        if task == "aks":
            return tagged(aks(frame))
        if task == "kfg_again":
            return tagged(again([int(r) for r in fields[2].split(", ")]))
        return ktg

    return answer


def run(script, n_frames=10, **section):
    pipeline = Pipeline(script, PROMPTS, PredictSection(**section), CANVAS)
    return pipeline.run([VideoQuery(clip(n_frames), "the cat")])[0]


def test_a_candidate_that_is_accepted_is_the_keyframe():
    script = Script(answers())
    trace = run(script)
    assert script.tasks() == ["vdg", "kfg", "aks", "ktg"]
    assert (trace.initial_keyframe, trace.keyframe, trace.rounds) == (3, 3, 1)
    assert trace.faults == []
    assert [(s.task, s.frame) for s in trace.steps] == [
        ("vdg", None),
        ("kfg", None),
        ("aks", 3),
        ("ktg", 3),
    ]
    assert script.calls[2][1] == ["the cat", "A cat sits."]
    assert script.calls[3][1] == ["the cat", "A cat sits.", "112"]


def test_refused_candidates_are_reselected_until_one_is_accepted():
    again = iter(["7", "1"])
    script = Script(answers(aks=lambda f: "A" if f == 1 else "B", again=lambda r: next(again)))
    trace = run(script)
    assert script.tasks() == ["vdg", "kfg", "aks", "kfg_again", "aks", "kfg_again", "aks", "ktg"]
    assert [fields[2] for task, fields, _ in script.calls if task == "kfg_again"] == ["3", "3, 7"]
    assert (trace.initial_keyframe, trace.keyframe, trace.rounds) == (3, 1, 3)
    assert script.calls[-1][2] == 1
    assert trace.faults == []


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_at_most_lambda_judgements_then_the_last_candidate_stands(rounds):
    order = [3, 0, 1, 2, 4, 5, 6, 7]
    script = Script(answers(aks=lambda f: "B", again=lambda r: str(order[len(r)])))
    trace = run(script, rounds=rounds)
    assert script.tasks().count("aks") == script.tasks().count("kfg_again") == rounds
    assert trace.rounds == rounds
    assert trace.keyframe == order[rounds]
    assert trace.initial_keyframe == 3


def test_without_kfg_the_first_frame_is_judged_first():
    script = Script(answers())
    trace = run(script, kfg=False)
    assert script.tasks() == ["vdg", "aks", "ktg"]
    assert (trace.initial_keyframe, trace.keyframe) == (0, 0)


def test_without_vdg_prompts_say_that_there_is_no_description():
    script = Script(answers())
    assert run(script, vdg=False).description == ""
    assert script.tasks() == ["kfg", "aks", "ktg"]
    assert [fields[1] for task, fields, _ in script.calls if task != "kfg"] == [NO_DESCRIPTION] * 2


@pytest.mark.parametrize("answer", ["", "10", "-1", "three", "3.0"])
def test_without_a_keyframe_the_first_frame_is_used_and_a_fault_recorded(answer):
    trace = run(Script(answers(kfg=answer)))
    assert trace.keyframe == 0
    assert trace.faults == ["kfg:no_keyframe"]


def test_a_refused_frame_named_again_is_replaced_by_the_farthest():
    script = Script(answers(aks=lambda f: "A" if f == 9 else "B", again=lambda r: "3"))
    trace = run(script)
    assert trace.keyframe == 9
    assert trace.faults == ["kfg_again:refused_frame"]


def test_all_frames_refused_ends_the_loop():
    script = Script(answers(kfg="0", aks=lambda f: "B", again=lambda r: "x"))
    trace = run(script, n_frames=2, rounds=5)
    assert trace.rounds == 2
    assert trace.faults == ["kfg_again:no_keyframe", "aks:all_frames_refused"]
    assert trace.keyframe == 1


def test_neither_option_keeps_the_candidate():
    script = Script(answers(aks=lambda f: "C"))
    trace = run(script)
    assert (trace.keyframe, trace.rounds, trace.faults) == (3, 1, ["aks:no_option"])


def test_light_reevaluation_shows_a_uniform_sample():
    def again(rejected):
        assert rejected == [1]  # frame 30 of 100 is nearest to 37, the second of 12, 37, 62, 87
        return "2"

    script = Script(answers(kfg="30", aks=lambda f: "A" if f == 62 else "B", again=again))
    trace = run(script, n_frames=100, reevaluate_frames=4)
    (fields,) = [fields for task, fields, _ in script.calls if task == "kfg_again"]
    assert fields[1] == "4"
    assert fields[-1] == [12, 37, 62, 87]
    assert trace.keyframe == 62
    (whole,) = [fields for task, fields, _ in script.calls if task == "kfg"]
    assert whole[1:3] == ["100", "99"]


def test_long_videos_are_sampled_when_asked_for():
    script = Script(answers(kfg="1"))
    trace = run(script, n_frames=100, max_frames=4)
    assert [fields[-1] for task, fields, _ in script.calls if task in ("vdg", "kfg")] == [
        [12, 37, 62, 87]
    ] * 2
    assert trace.keyframe == 37


def test_a_video_is_described_once_for_all_its_queries():
    script = Script(answers())
    pipeline = Pipeline(script, PROMPTS, PredictSection(), CANVAS)
    queries = [VideoQuery(clip(key=k), f"query {i}") for i, k in enumerate("aab")]
    traces = pipeline.run(queries)
    traces += pipeline.run([VideoQuery(clip(key="a"), "later")])
    assert script.tasks().count("vdg") == 2
    assert [t.query for t in traces] == ["query 0", "query 1", "query 2", "later"]
    assert all(t.description == "A cat sits." and t.steps[0].task == "vdg" for t in traces)


def test_a_batch_gives_each_query_what_it_gets_alone():
    def answer(task, fields, frame):
        if task == "kfg":
            return tagged(fields[0])  # the query names the frame
        if task == "aks":
            return tagged("A" if frame == 2 * int(fields[0]) else "B")
        if task == "kfg_again":
            return tagged(int(fields[2].split(", ")[-1]) + 1)
        return KTG

    pipeline = Pipeline(Script(answer), PROMPTS, PredictSection(), CANVAS)
    queries = [VideoQuery(clip(), str(i)) for i in range(5)]
    together = pipeline.run(queries)
    assert together == [pipeline.run([query])[0] for query in queries]
    assert [t.keyframe for t in together] == [0, 2, 4, 6, 8]
    assert [t.rounds for t in together] == [1, 2, 3, 4, 5]


def test_boxes_are_scaled_to_the_source():
    trace = run(Script(answers()))
    assert trace.boxes_canvas == [[28, 28, 56, 84]]
    assert trace.boxes_source == [[20, 15, 40, 45]]
    assert trace.points_source == [[30, 30]]


@settings(deadline=None)
@given(
    st.tuples(st.integers(0, 111), st.integers(0, 111)),
    st.tuples(st.integers(1, 112), st.integers(1, 112)),
    st.integers(1, 2000),
    st.integers(1, 2000),
)
def test_source_boxes_lie_in_the_image_and_scale_back(corner, size, height, width):
    x1, y1 = corner
    box = [x1, y1, x1 + size[0], y1 + size[1]]
    trace = Trace("q", boxes_canvas=[box], points_canvas=[[x1, y1]])
    to_source(trace, 112, height, width)
    (left, top, right, bottom), (x, y) = trace.boxes_source[0], trace.points_source[0]
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (x, y) == (left, top)
    back = [left * 112 / width, top * 112 / height, right * 112 / width, bottom * 112 / height]
    assert back == pytest.approx([min(value, 112) for value in box])


@pytest.mark.parametrize(
    ("answer", "boxes", "points", "faults"),
    [
        ("[]", [], [], []),
        ("nonsense", [], [], ["ktg:json_invalid"]),
        ('[{"point_2d": [1, 2]}]', [], [], ["ktg:box_missing"]),
        ('[{"bbox_2d": [200, 0, 210, 9], "point_2d": [1, 2]}]', [], [], ["ktg:box_outside"]),
        ('[{"bbox_2d": [0, 10, 20, 30]}]', [[0, 10, 20, 30]], [[10, 20]], ["ktg:point_missing"]),
        (
            '[{"bbox_2d": [-8, 10, 20, 30], "point_2d": [-1, 20]}]',
            [[-8, 10, 20, 30]],
            [[10, 20]],
            ["ktg:point_outside"],
        ),
    ],
)
def test_valid_objects_are_read_from_a_response(answer, boxes, points, faults):
    trace = Trace("q")
    read_objects(trace, tagged(answer), 112)
    assert (trace.boxes_canvas, trace.points_canvas, trace.faults) == (boxes, points, faults)


def test_a_response_without_an_answer_grounds_nothing():
    trace = run(Script(answers(ktg="I see a cat")))
    assert trace.boxes_source == []
    assert trace.faults == ["ktg:answer_missing"]


def test_the_zero_target_setting_uses_its_prompt():
    script = Script(answers(ktg=tagged("[]")))
    trace = run(script, zero_target=True)
    assert script.tasks()[-1] == "zero"
    assert (trace.boxes_source, trace.faults) == ([], [])


def test_a_trace_can_be_written_as_json():
    trace = run(Script(answers()))
    values = json.loads(json.dumps(as_dict(trace, segmenter="flow")))
    assert values["steps"][1] == {"task": "kfg", "frame": None, "response": tagged("3")}
    assert values["segmenter"] == "flow"
    assert values["boxes_source"] == [[20.0, 15.0, 40.0, 45.0]]
