"""The pipeline's rules, with a scripted policy instead of the model."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.errors import InputError
from rcot_rl.inference.pipeline import NO_DESCRIPTION, VideoReasoner
from rcot_rl.inference.policy import PolicyResponse, PolicySet
from rcot_rl.inference.query_trace import (
    Trace,
    VideoClip,
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
        "kfg_again": "kfg_again|$query|$n_frames|$rejected|$description|$refusals",
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

    async def generate(self, request, sampling, started=None):
        task, *fields = request.text.split("|")
        if request.image is not None:
            assert request.image.shape == (112, 112, 3)
            frame = int(request.image[0, 0, 0])
        else:
            assert request.video.shape[1:] == (56, 56, 3)
            frame = None
            fields.append(request.video[:, 0, 0, 0].tolist())
        self.calls.append((task, fields, frame))
        await asyncio.sleep(0)
        if started is not None:
            started.set()
        text = self.answer(task, fields, frame)
        chances = self.chances(frame) if sampling.options else None
        return [PolicyResponse(text, option_probabilities=chances)] * sampling.n

    def chances(self, frame):
        return {"A": 0.5, "B": 0.5}

    def count_tokens(self, text):
        return len(text.split())

    def most_frames(self, side, text_tokens):
        return self.fits

    fits = 1000

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


def reason(script, queries, n_frames=10, **section):
    """Return the traces of queries about one video, which run together."""
    settings = PredictSection(**section).reasoning()

    async def together():
        video = VideoReasoner(clip(n_frames), script, PROMPTS, CANVAS)
        return await asyncio.gather(*(video.trace(query, settings) for query in queries))

    return asyncio.run(together())


def run(script, n_frames=10, **section):
    return reason(script, ["the cat"], n_frames, **section)[0]


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
    traces = reason(script, ["query 0", "query 1", "query 2"])
    assert script.tasks().count("vdg") == 1
    assert [t.query for t in traces] == ["query 0", "query 1", "query 2"]
    assert all(t.description == "A cat sits." and t.steps[0].task == "vdg" for t in traces)


def test_queries_that_run_together_get_what_each_gets_alone():
    def answer(task, fields, frame):
        if task == "kfg":
            return tagged(fields[0])  # the query names the frame
        if task == "aks":
            return tagged("A" if frame == 2 * int(fields[0]) else "B")
        if task == "kfg_again":
            return tagged(int(fields[2].split(", ")[-1]) + 1)
        return KTG

    queries = [str(i) for i in range(5)]
    together = reason(Script(answer), queries)
    assert together == [run_one(answer, query) for query in queries]
    assert [t.keyframe for t in together] == [0, 2, 4, 6, 8]
    assert [t.rounds for t in together] == [1, 2, 3, 4, 5]


def run_one(answer, query):
    return reason(Script(answer), [query])[0]


def test_the_first_request_about_a_video_goes_alone():
    """Otherwise several requests in one batch would each encode the video."""
    script, waiting = Script(answers()), []
    generate = script.generate

    async def watched(request, sampling, started=None):
        if request.video is not None:
            waiting.append(started is not None)
            assert len(waiting) == 1 or script.first_is_done
        result = await generate(request, sampling, started)
        script.first_is_done = True
        return result

    script.first_is_done, script.generate = False, watched
    reason(script, ["a", "b", "c"])
    assert waiting == [True, False, False, False]


def test_a_failed_first_request_lets_the_others_go_on():
    script = Script(answers())
    generate = script.generate

    async def failing(request, sampling, started=None):
        if request.text.startswith("vdg"):
            raise InputError("broken")
        return await generate(request, sampling, started)

    script.generate = failing
    with pytest.raises(InputError, match="broken"):
        reason(script, ["a"])
    assert "kfg" in script.tasks()


def test_variants_send_equal_requests_once():
    script = Script(answers(aks=lambda f: "A" if f == 0 else "B"))
    section = PredictSection(variants={"no-aks": {"rounds": 0}, "two": {"rounds": 2}})

    async def together():
        video = VideoReasoner(clip(), script, PROMPTS, CANVAS)
        names = [None, *section.variants]
        return await asyncio.gather(
            *(video.trace("the cat", section.reasoning(name)) for name in names)
        )

    whole, none, two = asyncio.run(together())
    assert sorted(script.tasks()) == ["aks", "aks", "kfg", "kfg_again", "ktg", "ktg", "vdg"]
    assert (whole.keyframe, none.keyframe, two.keyframe) == (0, 3, 0)
    assert two == whole
    assert none.steps[:2] == whole.steps[:2]


def test_a_reselection_is_told_why_frames_were_refused():
    def answer(task, fields, frame):
        if task == "aks" and frame == 3:
            return "<think>a tree\nhides it</think><answer>B</answer>"
        return answers(again=lambda r: "7")(task, fields[:4], frame)

    script = Script(answer)
    run(script)
    (fields,) = [fields for task, fields, _ in script.calls if task == "kfg_again"]
    assert fields[4] == "- 3: a tree hides it"


@pytest.mark.parametrize(
    ("choice", "keyframe", "reselections"), [("last", 2, 3), ("likeliest", 0, 2)]
)
def test_after_lambda_refusals_the_setting_decides(choice, keyframe, reselections):
    order = [3, 0, 1, 2]
    script = Script(answers(aks=lambda f: "B", again=lambda r: str(order[len(r)])))
    script.chances = lambda frame: {"A": {3: 0.1, 0: 0.4, 1: 0.2}[frame], "B": 0.5}
    trace = run(script, rounds=3, on_exhausted=choice)
    assert trace.keyframe == keyframe
    assert script.tasks().count("kfg_again") == reselections
    assert [s.option_probabilities["A"] for s in trace.steps if s.task == "aks"] == [0.1, 0.4, 0.2]


def test_a_video_that_does_not_fit_is_thinned_and_the_trace_lists_the_frames():
    script = Script(answers(kfg="1"))
    script.fits = 4
    trace = run(script, n_frames=100)
    assert trace.shown_frames == [12, 37, 62, 87]
    assert trace.keyframe == 37
    assert trace.steps[0].frames == trace.steps[1].frames == [12, 37, 62, 87]
    script.fits = 1000
    assert run(script, n_frames=100).shown_frames is None


def test_a_context_without_room_for_a_frame_is_an_error():
    script = Script(answers())
    script.fits = 0
    with pytest.raises(InputError, match=r"engine\.max_model_len: holds no frame"):
        run(script)


def test_frames_can_be_named_by_seconds():
    templates = dict(PROMPTS.templates) | {
        "kfg_seconds": "kfg|$query|$n_frames|$last_second",
        "kfg_again_seconds": "kfg_again|$query|$n_frames|$rejected|$description",
    }
    again = answers(kfg="1.4", aks=lambda f: "B" if f == 3 else "A")

    def answer(task, fields, frame):
        if task == "kfg_again":
            assert fields[2] == "1.50"
            return tagged("4.5")
        return again(task, fields, frame)

    script = Script(answer)
    settings = PredictSection(frame_names="seconds", fps=2.0).reasoning()
    video = VideoReasoner(clip(), script, Prompts("named", templates), CANVAS)

    async def one():
        return await video.trace("the cat", settings)

    trace = asyncio.run(one())
    assert (trace.initial_keyframe, trace.keyframe) == (3, 9)
    with pytest.raises(InputError, match="no template kfg_again_seconds"):
        run(Script(answers()), frame_names="seconds")


def test_each_task_can_have_its_own_model():
    scripts = {name: Script(answers()) for name in ("checkpoint", "base")}
    policies = PolicySet(scripts["checkpoint"], {"base": scripts["base"]})
    settings = PredictSection(models={"vdg": "base", "kfg": "base"}).reasoning()

    async def one():
        return await VideoReasoner(clip(), policies, PROMPTS, CANVAS).trace("the cat", settings)

    asyncio.run(one())
    assert scripts["base"].tasks() == ["vdg", "kfg"]
    assert scripts["checkpoint"].tasks() == ["aks", "ktg"]


def test_surplus_and_duplicate_objects_are_dropped_and_counted():
    box = '{"bbox_2d": [%d, 28, 56, 84], "point_2d": [42, 56]}'
    objects = ", ".join(box % left for left in (28, 28, 29, 10, 40))
    trace = run(Script(answers(ktg=tagged(f"[{objects}]"))), max_objects=2)
    assert [b[0] for b in trace.boxes_canvas] == [28, 10]
    assert trace.faults == ["ktg:duplicate", "ktg:duplicate", "ktg:too_many"]


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
    step = values["steps"][1]
    assert (step["task"], step["frame"], step["response"]) == ("kfg", None, tagged("3"))
    assert step["prompt"] == "kfg|the cat|10|9"
    assert values["segmenter"] == "flow"
    assert values["boxes_source"] == [[20.0, 15.0, 40.0, 45.0]]
