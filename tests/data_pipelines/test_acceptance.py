"""Which traces are kept: those with the right answer, of their own finding, in bounds."""

from __future__ import annotations

import json
import time

import pytest

from data_pipelines.traces.trace_filter import CAUSES, Acceptance
from rcot_rl.recipe.data import TracerSection

SECTION = TracerSection(min_words=4, max_words=60)
THINK = "A red circle is on the left and a blue square moves behind it to the right"
BOX = {"bbox_2d": [100, 120, 300, 340], "point_2d": [200, 230]}
OTHER = {"bbox_2d": [500, 500, 700, 800], "point_2d": [600, 640]}


def said(answer: object, think: str = THINK) -> str:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return f"<think>{think}</think>\n<answer>{text}</answer>"


@pytest.fixture(scope="module")
def accept() -> Acceptance:
    return Acceptance(SECTION, 840)


@pytest.mark.parametrize(
    ("task", "response", "truth", "causes"),
    [
        ("aks", said("A"), "A", ()),
        ("aks", said(" B\n"), "B", ()),
        ("aks", said("A"), "B", ("wrong_option",)),
        ("aks", said("A or B"), "A", ("wrong_option",)),
        ("aks", "A", "A", ("malformed",)),
        ("aks", said("A") + said("A"), "A", ("malformed",)),
        ("ktg", said([BOX]), [BOX], ()),
        ("ktg", said([OTHER, BOX]), [BOX, OTHER], ()),
        ("ktg", said([BOX]), [BOX, OTHER], ("wrong_count",)),
        ("ktg", said([BOX, BOX]), [BOX], ("wrong_count",)),
        ("ktg", said([OTHER]), [BOX], ("inaccurate",)),
        ("ktg", said("no boxes"), [BOX], ("malformed",)),
        ("ktg", said([]), [], ()),
        ("ktg", said([BOX]), [], ("wrong_count",)),
        ("aks", said("A", "red"), "A", ("short",)),
        ("aks", said("A", "red circle then " * 40), "A", ("long", "repeated")),
        ("aks", said("A", THINK + ". The given answer is A"), "A", ("leak",)),
        ("ktg", said([BOX], THINK + " at [100, 120, 300, 340]"), [BOX], ("leak",)),
        ("ktg", said([BOX], THINK + " near 100 and 340"), [BOX], ()),
    ],
)
def test_causes(accept, task, response, truth, causes):
    verdict = accept.verdict(task, response, truth)
    assert verdict.causes == causes
    assert set(causes) <= set(CAUSES)


@pytest.mark.parametrize(
    "tell",
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
def test_leaks(accept, tell):
    assert accept.verdict("aks", said("A", f"{THINK}, {tell}"), "A").causes == ("leak",)


@pytest.mark.parametrize(
    "plain",
    [
        "a man gives the ball to a dog",
        "the target is visible and unoccluded",
        "the answer follows from the motion",
        "it stands on the box at the right",
    ],
)
def test_plain_words_are_no_leaks(accept, plain):
    assert accept.verdict("aks", said("A", f"{THINK}, {plain}"), "A").accepted


def test_near_answers_count_as_far_as_the_matcher_credits_them():
    near = {"bbox_2d": [104, 124, 304, 344], "point_2d": [205, 235]}
    off = {"bbox_2d": [160, 120, 360, 340], "point_2d": [260, 230]}
    strict, lenient = (
        Acceptance(SECTION.model_copy(update={"min_accuracy": share}), 840) for share in (1.0, 0.3)
    )
    assert strict.verdict("ktg", said([near]), [BOX]).accepted
    assert not strict.verdict("ktg", said([off]), [BOX]).accepted
    assert lenient.verdict("ktg", said([off]), [BOX]).accepted


def test_boxes_in_reasoning_can_be_allowed():
    accept = Acceptance(SECTION.model_copy(update={"forbid_coordinates": False}), 840)
    assert accept.verdict("ktg", said([BOX], THINK + " at [100, 120, 300, 340]"), [BOX]).accepted


def test_hostile_responses_take_no_time(accept):
    for text in ("given " * 50000, "<think>" * 20000, "as given to " * 20000, "1, " * 60000):
        started = time.perf_counter()
        assert not accept.verdict("ktg", f"<think>{text}</think><answer>[]</answer>", []).accepted
        assert time.perf_counter() - started < 2
