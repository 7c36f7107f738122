"""The sentence about a query: what was found, or why nothing was found."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcot_rl.inference.query_trace import Trace, TraceStep, read_objects
from rcot_rl.inference.segment_outcome import SegmentOutcome, refused_frames, step_text


def answered(answer: str) -> str:
    return f"<think>so</think><answer>{answer}</answer>"


def grounded(response: str, **fields) -> Trace:
    trace = Trace("the cat", **fields)
    read_objects(trace, response, 112)
    trace.boxes_source, trace.points_source = trace.boxes_canvas, trace.points_canvas
    trace.steps.append(TraceStep("ktg", trace.keyframe, response))
    return trace


def outcome(trace: Trace, shares=(0.0, 0.0, 0.0)) -> SegmentOutcome:
    return SegmentOutcome(trace, Path("out"), ("a", "b", "c"), shares)


BOX = '{"bbox_2d": [28, 28, 56, 84], "point_2d": [42, 56]}'


def test_what_was_found_is_counted():
    trace = grounded(answered(f"[{BOX}, {BOX}]"), keyframe=1, rounds=2)
    found = outcome(trace, (0.0, 0.1, 0.3))
    assert found.nothing_found is None
    assert (found.frames_with_mask, found.area_share) == (2, pytest.approx(0.2))
    assert found.sentence() == (
        "the cat: 2 objects, keyframe 1 of 3 frames, 2 judgements; mask in 2 of 3 frames, "
        "20.0 % of their area"
    )
    values = found.as_dict()
    assert (values["objects"], values["keyframe_name"], values["nothing_found"]) == (2, "b", None)


@pytest.mark.parametrize(
    ("response", "reason", "words"),
    [
        ("I see no cat", "unreadable_answer", "unreadable (answer_missing)"),
        (answered("[{]"), "unreadable_answer", "json_invalid"),
        (answered("7"), "unreadable_answer", "answer_not_a_list"),
        (answered("[]"), "no_object", "lists no object"),
        (answered('[{"bbox_2d": [9, 9, 3, 3]}]'), "no_valid_box", "box_not_ordered"),
        (answered('[{"bbox_2d": [200, 0, 300, 9]}]'), "no_valid_box", "box_outside"),
        (answered(f"[{BOX}]"), "empty_masks", "1 box, but the segmenter masked no pixel"),
    ],
)
def test_nothing_found_has_a_reason(response, reason, words):
    nothing = outcome(grounded(response))
    assert nothing.nothing_found == reason
    assert "nothing found: " in nothing.sentence() and words in nothing.sentence()
    assert nothing.area_share == 0.0


def test_refused_frames_and_verdicts_are_named():
    trace = Trace("the cat", keyframe=7, rounds=3)
    lines = []
    for frame, answer in ((4, "B"), (0, "B"), (7, "perhaps")):
        trace.steps.append(TraceStep("aks", frame, answered(answer)))
        lines.append(step_text(trace.steps[-1]))
    assert lines == [
        "judged frame 4: refused",
        "judged frame 0: refused",
        "judged frame 7: no valid answer",
    ]
    assert refused_frames(trace) == [4, 0]
    assert (
        "3 judgements, refused: 4, 0"
        in outcome(Trace("the cat", rounds=3, steps=trace.steps)).sentence()
    )
    trace.faults.append("aks:all_frames_refused")
    trace.keyframe = 1
    assert "all frames refused" in outcome(trace).sentence()


def test_proposals_and_groundings_are_named():
    steps = [
        TraceStep("kfg", None, answered("3")),
        TraceStep("kfg_again", None, "I do not know"),
        TraceStep("ktg", 3, answered(f"[{BOX}, {{}}]")),
        TraceStep("vdg", None, " "),
    ]
    assert [step_text(step) for step in steps] == [
        "keyframe proposal: 3",
        "keyframe proposal: no answer",
        "grounded frame 3: 1 object",
        "description: empty",
    ]


def test_texts_of_model_and_user_cannot_control_the_terminal():
    trace = Trace("a\x1b[2J\nb", description="x\r\x07" + "y" * 5000)
    trace.steps.append(TraceStep("vdg", None, trace.description))
    for line in (step_text(trace.steps[-1]), outcome(trace).sentence()):
        assert line.isprintable() and len(line) < 300
