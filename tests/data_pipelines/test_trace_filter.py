"""A trace is kept if its answer is right, it does not leak, and its length is in bounds."""

from __future__ import annotations

import json
import time
from typing import get_args

import pytest

from data_pipelines.traces.trace_filter import Cause, TraceFilter
from rcot_rl.recipe.data_section import TracerSection

SECTION = TracerSection(min_words=4, max_words=60)
THINK = "A red circle is on the left and a blue square moves behind it to the right"
BOX = {"bbox_2d": [100, 120, 300, 340], "point_2d": [200, 230]}
OTHER = {"bbox_2d": [500, 500, 700, 800], "point_2d": [600, 640]}


def response(answer: object, think: str = THINK) -> str:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return f"<think>{think}</think>\n<answer>{text}</answer>"


@pytest.fixture(scope="module")
def trace_filter() -> TraceFilter:
    return TraceFilter(SECTION, 840)


@pytest.mark.parametrize(
    ("task", "response", "truth", "causes"),
    [
        ("aks", response("A"), "A", ()),
        ("aks", response(" B\n"), "B", ()),
        ("aks", response("A"), "B", ("wrong_option",)),
        ("aks", response("A or B"), "A", ("wrong_option",)),
        ("aks", "A", "A", ("malformed",)),
        ("aks", response("A") + response("A"), "A", ("malformed",)),
        ("ktg", response([BOX]), [BOX], ()),
        ("ktg", response([OTHER, BOX]), [BOX, OTHER], ()),
        ("ktg", response([BOX]), [BOX, OTHER], ("wrong_count",)),
        ("ktg", response([BOX, BOX]), [BOX], ("wrong_count",)),
        ("ktg", response([OTHER]), [BOX], ("inaccurate",)),
        ("ktg", response("no boxes"), [BOX], ("malformed",)),
        ("ktg", response([]), [], ()),
        ("ktg", response([BOX]), [], ("wrong_count",)),
        ("aks", response("A", "red"), "A", ("short",)),
        ("aks", response("A", "red circle then " * 40), "A", ("long", "repeated")),
        ("aks", response("A", THINK + ". The given answer is A"), "A", ("leak",)),
        ("ktg", response([BOX], THINK + " at [100, 120, 300, 340]"), [BOX], ("leak",)),
        ("ktg", response([BOX], THINK + " near 100 and 340"), [BOX], ()),
    ],
)
def test_each_kind_of_response_has_its_causes(trace_filter, task, response, truth, causes):
    verdict = trace_filter.verdict(task, response, truth)
    assert verdict.causes == causes
    assert set(causes) <= set(get_args(Cause))


@pytest.mark.parametrize(
    "phrase",
    [
        "the annotation shows it",
        "as the ground truth says",
        "The provided bounding box is there",
        "according to the coordinates",
        "I was told where",
        "this matches the hint",
        "the correct option is given",
        "the boxes are given to me",
    ],
)
def test_phrases_that_reveal_the_annotation_are_leaks(trace_filter, phrase):
    assert trace_filter.verdict("aks", response("A", f"{THINK}, {phrase}"), "A").causes == ("leak",)


@pytest.mark.parametrize(
    "plain",
    [
        "a man gives the ball to a dog",
        "the target is visible and unoccluded",
        "the answer follows from the motion",
        "it stands on the box at the right",
    ],
)
def test_plain_descriptions_are_not_leaks(trace_filter, plain):
    assert trace_filter.verdict("aks", response("A", f"{THINK}, {plain}"), "A").accepted


def test_near_answers_count_as_far_as_the_matcher_credits_them():
    near = {"bbox_2d": [104, 124, 304, 344], "point_2d": [205, 235]}
    off = {"bbox_2d": [160, 120, 360, 340], "point_2d": [260, 230]}
    strict, lenient = (
        TraceFilter(SECTION.model_copy(update={"min_accuracy": share}), 840) for share in (1.0, 0.3)
    )
    assert strict.verdict("ktg", response([near]), [BOX]).accepted
    assert not strict.verdict("ktg", response([off]), [BOX]).accepted
    assert lenient.verdict("ktg", response([off]), [BOX]).accepted


def test_boxes_in_reasoning_can_be_allowed():
    trace_filter = TraceFilter(SECTION.model_copy(update={"forbid_coordinates": False}), 840)
    assert trace_filter.verdict(
        "ktg", response([BOX], THINK + " at [100, 120, 300, 340]"), [BOX]
    ).accepted


def test_hostile_responses_are_judged_quickly(trace_filter):
    for text in ("given " * 50000, "<think>" * 20000, "as given to " * 20000, "1, " * 60000):
        started = time.perf_counter()
        assert not trace_filter.verdict(
            "ktg", f"<think>{text}</think><answer>[]</answer>", []
        ).accepted
        assert time.perf_counter() - started < 2
