"""The parser: structure, options, keyframes, grounding; hostile text."""

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.protocol import grounding as grounding_module
from rcot_rl.protocol import parser
from rcot_rl.protocol.grounding import parse_grounding
from rcot_rl.protocol.parser import (
    TAGS,
    answer_only_faults,
    parse_keyframe,
    parse_option,
    parse_response,
)

pieces = st.sampled_from([*TAGS, " ", "\n", "x", "A", "<", "think", "/"])
tagged = st.lists(pieces, max_size=14).map("".join)


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>t</think><answer>A</answer>", "t", "A"),
        ("\n <think> t </think>\n\n<answer> A\n</answer> \n", "t", "A"),
        ("<think></think><answer></answer>", "", ""),
        ("<think>a < b > c </thinking></think><answer>[]</answer>", "a < b > c </thinking>", "[]"),
    ],
)
def test_responses_with_both_blocks_are_well_formed(text, thought, answer):
    parsed = parse_response(text)
    assert (parsed.well_formed, parsed.faults) == (True, ())
    assert (parsed.thought, parsed.answer) == (thought, answer)


@pytest.mark.parametrize(
    ("text", "answer", "fault"),
    [
        ("", None, "think_missing"),
        ("<answer>A</answer>", "A", "think_missing"),
        ("reasoning</think><answer>A</answer>", "A", "think_missing"),
        ("<think>t<answer>A</answer>", "A", "think_unclosed"),
        ("<think>t</think>A", None, "answer_missing"),
        ("<think>t</think><answer>A", None, "answer_unclosed"),
        ("<think>t<answer>A</answer></think>", None, "answer_inside_think"),
        ("<think>t<answer>A</answer></think><answer>B</answer>", "B", "stray_tag"),
        ("<think>t</think><answer>A</answer><answer>B</answer>", None, "answer_repeated"),
        ("<think>t</think><think>u</think><answer>A</answer>", "A", "think_repeated"),
        ("<answer>A</answer><think>t</think>", "A", "answer_before_think"),
        ("<answer><think>t</think>A</answer>", "<think>t</think>A", "think_inside_answer"),
        ("<think>t</think>so <answer>A</answer>", "A", "text_outside_tags"),
        ("ok <think>t</think><answer>A</answer>", "A", "text_outside_tags"),
        ("<think>t</think><answer>A</answer>.", "A", "text_outside_tags"),
        ("<think>t</think><answer>A</answer></answer>", "A", "stray_tag"),
        ("<think>the </think> tag</think><answer>A</answer>", "A", "stray_tag"),
        ("<THINK>t</THINK><answer>A</answer>", "A", "think_missing"),
    ],
)
def test_responses_with_broken_structure_are_malformed(text, answer, fault):
    parsed = parse_response(text)
    assert not parsed.well_formed
    assert parsed.answer == answer
    assert fault in parsed.faults


def well_formed_by_definition(text):
    """Apply the contract's definition: one frame, and none of the four tags a second time."""
    frame = re.fullmatch(r"<think>.*</think>\s*<answer>.*</answer>", text.strip(), re.DOTALL)
    return bool(frame) and all(text.count(tag) == 1 for tag in TAGS)


@given(tagged)
def test_an_answer_only_response_is_one_answer_block_and_no_other_tag(text):
    frame = re.fullmatch(r"<answer>.*</answer>", text.strip(), re.DOTALL)
    counts = [text.count(tag) for tag in TAGS]
    expected = bool(frame) and counts == [0, 0, 1, 1]
    faults = answer_only_faults(text)
    assert (faults == ()) == expected
    assert all(0 <= fault.at <= len(text) for fault in faults)
    assert not (expected and parse_response(text).well_formed)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("<answer>A</answer>", []),
        ("\n <answer> A </answer> \n", []),
        ("<think>t</think><answer>A</answer>", [("think_unexpected", 0)]),
        (" <answer>A</answer></think>", [("think_unexpected", 19)]),
        ("A", [("answer_missing", 0)]),
        ("<answer>A", [("answer_unclosed", 0)]),
        ("<answer>A</answer><answer>B</answer>", [("answer_repeated", 18)]),
        ("<answer>A</answer></answer>", [("stray_tag", 18)]),
        ("so <answer>A</answer>", [("text_outside_tags", 0)]),
        ("<answer>A</answer> so", [("text_outside_tags", 19)]),
        ("x" * ((1 << 22) + 1), [("response_too_long", 1 << 22)]),
        ("<answer></answer>" * 4097, [("too_many_blocks", 0)]),
    ],
)
def test_an_answer_only_response_names_each_fault_with_its_place(text, faults):
    assert [(str(f), f.at) for f in answer_only_faults(text)] == faults


def only_answer(text):
    """Return the blocks by reading one character at a time."""
    answers, i = [], 0
    while i < len(text):
        kind = next((k for k in ("think", "answer") if text.startswith(f"<{k}>", i)), None)
        end = text.find(f"</{kind}>", i) if kind else -1
        if end < 0:
            i += 1
            continue
        if kind == "answer":
            answers.append(text[i + len("<answer>") : end].strip())
        i = end + len(f"</{kind}>")
    return answers[0] if len(answers) == 1 else None


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(tagged)
def test_structure_agrees_with_the_definition(text):
    parsed = parse_response(text)
    assert parsed.well_formed == well_formed_by_definition(text)
    assert parsed.answer == only_answer(text)
    assert bool(parsed.faults) != parsed.well_formed


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.one_of(st.text(max_size=200), st.binary(max_size=200).map(lambda b: b.decode("latin1"))))
def test_no_text_raises_an_exception(text):
    for body in (text, f"<think>{text}</think><answer>{text}</answer>"):
        answer = parse_response(body).answer
        for value in (answer, text):
            parse_option(value)
            parse_keyframe(value, 7)
            parse_grounding(value)


json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**400)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.sampled_from(["bbox_2d", "point_2d", "x"]), inner, max_size=3),
    ),
    max_leaves=30,
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.one_of(json_values, st.lists(json_values)))
def test_grounding_is_what_the_json_says(value):
    grounding = parse_grounding(json.dumps(value))
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        assert grounding.faults == ("json_invalid",)
        return
    is_list = isinstance(value, list) and all(isinstance(v, dict) for v in value)
    assert grounding.is_list == is_list
    assert grounding.n_items == len(grounding.items) == (len(value) if is_list else 0)
    assert bool(grounding.faults) != is_list
    for item in grounding.items:
        assert bool(item.faults) == (item.box is None or item.point is None)


def numbers(value, n):
    real = isinstance(value, list) and len(value) == n
    return real and all(type(v) in (int, float) and abs(v) < 1e300 for v in value)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(st.integers(-9, 9), st.floats(-9, 9), st.sampled_from([True, None, "1", 1e400])),
        min_size=3,
        max_size=5,
    ),
    st.lists(st.one_of(st.integers(-9, 9), st.booleans(), st.just("1")), min_size=1, max_size=3),
)
def test_items_are_four_ordered_numbers_and_two(box, point):
    text = json.dumps([{"bbox_2d": box, "point_2d": point}]).replace("Infinity", "1e400")
    item = parse_grounding(text).items[0]
    ordered = numbers(box, 4) and box[0] < box[2] and box[1] < box[3]
    assert item.box == (tuple(box) if ordered else None)
    assert item.point == (tuple(point) if numbers(point, 2) else None)


@pytest.mark.parametrize(
    "answer",
    [
        "[{'bbox_2d': [1, 2, 3, 4]}]",
        "```json\n[]\n```",
        '[{"bbox_2d": [1, 2, 3, NaN]}]',
        '[{"bbox_2d": [-Infinity, 2, 3, 4]}]',
        '[{"bbox_2d": [01, 2, 3, 4]}]',
        '[{"bbox_2d": [1., 2, 3, 4]}]',
        '[{"bbox_2d": [+1, 2, 3, 4]}]',
        '[{"bbox_2d": [1, 2, 3, 4],}]',
        "[] []",
        "[",
        "",
        "\ufeff[]",
        '[{"a\n": 1}]',
        "[{}] // two",
    ],
)
def test_answers_outside_rfc_8259_are_refused(answer):
    assert parse_grounding(answer).faults == ("json_invalid",)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (None, "answer_missing"),
        ("{}", "answer_not_a_list"),
        ('{"bbox_2d": [1, 2, 3, 4]}', "answer_not_a_list"),
        ("7", "answer_not_a_list"),
        ("[[1, 2, 3, 4]]", "item_not_an_object"),
        ('[{"bbox_2d": [1, 2, 3, 4]}, null]', "item_not_an_object"),
    ],
)
def test_answers_that_are_not_lists_of_objects_are_refused(answer, fault):
    grounding = parse_grounding(answer)
    assert (grounding.is_list, grounding.items, grounding.faults) == (False, [], (fault,))


def test_the_last_of_two_equal_keys_counts():
    answer = '[{"bbox_2d": [1, 2, 3, 4], "bbox_2d": [5, 6, 7, 8], "point_2d": [1, 1]}]'
    assert parse_grounding(answer).items[0].box == (5, 6, 7, 8)


def test_huge_numbers_are_not_finite_and_do_not_raise():
    for number in ("9" * 400, "9" * 5000, "9" * 300_000, "1e400", "-1" + "0" * 350):
        item = parse_grounding(f'[{{"bbox_2d": [0, 0, {number}, 9], "point_2d": [1, {number}]}}]')
        assert item.items[0].faults == ("box_not_finite", "point_not_finite")
    item = parse_grounding(f'[{{"bbox_2d": [{-(2**62)}, 0, {2**62}, 9]}}]').items[0]
    assert item.box == (-(2.0**62), 0, 2.0**62, 9) and all(map(math.isfinite, item.box))


def nested(depth):
    return "[" * depth + "]" * depth


def test_deep_nesting_is_refused_at_one_depth_for_every_caller():
    inside = '[{"x": %s}]'
    assert parse_grounding(inside % nested(grounding_module.MAX_DEPTH - 2)).is_list
    deep = inside % nested(grounding_module.MAX_DEPTH - 1)
    assert parse_grounding(deep).faults == ("json_too_deep",)
    for text in ("[" * 400_000, '{"a":' * 200_000, nested(100_000)):
        assert parse_grounding(text).faults == ("json_too_deep",)


def test_brackets_in_texts_are_no_nesting():
    entry = {"note": "[{" * 200 + '\\"' + "[" * 200, "bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2]}
    assert parse_grounding(json.dumps([entry] * 40)).n_items == 40


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("A", "A"),
        (" B\n", "B"),
        ("a", None),
        ("A.", None),
        ("AB", None),
        ("A or B", None),
        ("", None),
        (None, None),
        ("Option A", None),
        ("C", None),
    ],
)
def test_an_option_is_read_from_the_answer(answer, option):
    assert parse_option(answer) == option


def test_option_is_membership_of_a_set_and_not_of_a_text():
    assert parse_option("AB", "AB") is None
    assert parse_option("", "AB") is None
    assert parse_option("C", ("A", "B", "C")) == "C"


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("0", 0),
        (" 7\n", 7),
        ("9", 9),
        ("10", None),
        ("-1", None),
        ("+1", None),
        ("3.0", None),
        ("frame 3", None),
        ("3, 4", None),
        ("³", None),
        ("٣", None),
        ("1_0", None),
        ("", None),
        (None, None),
        ("9" * 5000, None),
    ],
)
def test_a_keyframe_is_read_from_the_answer(answer, index):
    assert parse_keyframe(answer, 10) == index


class CountingText(str):
    """A text that adds up the characters that its searches pass over."""

    passed = 0

    def strip(self):
        return type(self)(super().strip())

    def find(self, part, start=0, stop=None):
        stop = len(self) if stop is None else stop
        end = super().find(part, start, stop)
        type(self).passed += (end if end >= 0 else stop) - start
        return end

    def count(self, part):
        type(self).passed += len(self)
        return super().count(part)


@pytest.mark.parametrize(
    "unit",
    [
        "<answer>",
        "<think>",
        "</think>",
        "<think></think>",
        "<answer> ",
        "<",
        "<think",
        " ",
        "<answer></think>",
        "<think></answer>",
        "<think><answer></think>",
    ],
)
@pytest.mark.parametrize("lead", ["", "<answer>", "<think>", "<think>t</think><answer>"])
def test_structure_is_linear_in_the_length(unit, lead, monkeypatch):
    """Every search counted: hostile text of 1 MB costs a fixed number of passes over it."""
    monkeypatch.setattr(parser, "MAX_BLOCKS", 1 << 30)
    monkeypatch.setattr(CountingText, "passed", 0)
    text = CountingText(lead + unit * (1_000_000 // len(unit)))
    parsed = parse_response(text)
    assert not parsed.well_formed
    assert CountingText.passed <= 14 * len(text)


def test_a_megabyte_of_honest_thought_is_still_well_formed():
    parsed = parse_response(f"<think>{'so [1, 2] < 3. ' * 70_000}</think><answer>A</answer>")
    assert parsed.well_formed and parsed.answer == "A"


def test_bounds_fail_closed():
    long = f"<think>{'x' * parser.MAX_CHARS}</think><answer>A</answer>"
    assert parse_response(long).faults == ("response_too_long",)
    many = "<think></think>" * (parser.MAX_BLOCKS + 1) + "<answer>A</answer>"
    assert parse_response(many).answer is None
    assert parse_grounding(" " * parser.MAX_CHARS + "[]").faults == ("answer_too_long",)


@pytest.mark.parametrize(
    ("text", "fault", "at"),
    [
        ("  <answer>A</answer>", "think_missing", "<answer>"),
        ("so <think>t<answer>A</answer>", "think_unclosed", "<think>"),
        ("<think>t</think> <answer>A", "answer_unclosed", "<answer>A"),
        ("<think>t<answer>A</answer></think>", "answer_inside_think", "<answer>"),
        ("<answer>a<think>t</think>A</answer>", "think_inside_answer", "<think>"),
        ("<think>t</think><answer>A</answer><answer>B</answer>", "answer_repeated", "<answer>B"),
        ("<think>t</think><think>u</think><answer>A</answer>", "think_repeated", "<think>u"),
        ("<think>t</think><answer>A</answer></answer>", "stray_tag", "</answer></answer>"),
        ("<answer>A</answer><think>t</think>", "answer_before_think", "<answer>"),
        ("\n ok <think>t</think><answer>A</answer>", "text_outside_tags", "ok"),
        ("<think>t</think> so <answer>A</answer>", "text_outside_tags", "so"),
        ("<think>t</think><answer>A</answer> end", "text_outside_tags", "end"),
    ],
)
def test_faults_know_their_place(text, fault, at):
    faults = {str(f): f.at for f in parse_response(text).faults}
    place = text.find(at) + (len("</answer>") if fault == "stray_tag" else 0)
    assert faults[fault] == place


@settings(max_examples=800, deadline=None, derandomize=True)
@given(st.text(max_size=3), tagged)
def test_places_lie_in_the_text(lead, text):
    for fault in parse_response(lead + text).faults:
        assert 0 <= fault.at <= len(lead + text)


def test_json_faults_know_the_character_and_item_faults_their_number():
    assert parse_grounding('[{"bbox_2d": oops}]').faults[0].at == 13
    deep = '[{"x": ' + "[" * 100
    assert parse_grounding(deep).faults[0].at == 7 + grounding_module.MAX_DEPTH - 2
    assert parse_grounding("[{}, 3]").faults[0].at == 1
    items = parse_grounding('[{"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 1]}, {}]').items
    assert [f.at for f in items[1].faults] == [1, 1] and items[0].faults == ()


def slowly(answer):
    """Parse an answer with the standard library's reader alone."""

    class Refusing:
        def decode(self, _):
            raise ValueError

    fast, grounding_module._FAST = grounding_module._FAST, Refusing()
    try:
        return parse_grounding(answer)
    finally:
        grounding_module._FAST = fast


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.lists(json_values).map(json.dumps),
        st.text(alphabet='[]{}",:0123456789.eE+-truefalsn \n\\u', max_size=40),
    )
)
def test_both_json_readers_agree(answer):
    assert parse_grounding(answer) == slowly(answer)


def test_items_past_the_bound_are_counted_and_not_read(monkeypatch):
    monkeypatch.setattr(grounding_module, "MAX_ITEMS", 3)
    entry = {"bbox_2d": [1, 2, 3, 4], "point_2d": [1, 2]}
    grounding = parse_grounding(json.dumps([entry] * 5))
    assert (grounding.n_items, len(grounding.items)) == (5, 5)
    assert [bool(item.faults) for item in grounding.items] == [False] * 3 + [True] * 2
    assert parse_grounding(json.dumps([entry] * 4 + [7])).faults == ("item_not_an_object",)
