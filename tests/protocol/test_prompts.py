"""Prompt sets: the texts that reach the policy, and how a broken set is reported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.errors import InputError
from rcot_rl.protocol.frame_names import FrameNames
from rcot_rl.protocol.grounding import parse_grounding
from rcot_rl.protocol.parser import answer_only_faults, parse_response
from rcot_rl.protocol.prompts import SHIPPED, TASKS, Prompts, load_prompts, user_turn

SETS = sorted(p.stem for p in SHIPPED.glob("*.yaml"))
NASTY = "the $canvas {0} <image> %s $$ <think>"


def write(folder: Path, **changes: object) -> Path:
    """Write a complete user set with some templates changed; None omits one."""
    templates: dict[str, object] = {task: f"{task} text" for task in TASKS} | changes
    path = folder / "own.yaml"
    kept = {k: v for k, v in templates.items() if v is not None}
    path.write_text(yaml.safe_dump(kept), encoding="utf-8")
    return path


def all_turns(prompts: Prompts, query: str, description: str) -> dict[str, str]:
    return {
        "kfg": prompts.kfg(query, 6),
        "kfg_again": prompts.kfg_again(query, 6, [(3, ""), (1, "hidden")], description),
        "aks": prompts.aks(description, query),
        "ktg": prompts.ktg(description, query, canvas=112),
        "ktg_zero_target": prompts.ktg(description, query, zero_target=True, canvas=112),
    }


@pytest.mark.parametrize("name", SETS)
def test_shipped_sets_contain_the_query_and_differ_by_task(name: str) -> None:
    prompts = load_prompts(name)
    turns = all_turns(prompts, "the red fox", "a field at dawn") | {"vdg": prompts.vdg(6)}
    assert prompts.name == name
    assert len(set(turns.values())) == len(TASKS)
    for task, text in turns.items():
        assert text == text.strip() and text
        assert "$" not in text
        assert ("the red fox" in text) == (task != "vdg")
    for task in ("aks", "ktg", "ktg_zero_target"):
        assert "a field at dawn" in turns[task]


@pytest.mark.parametrize("name", SETS)
def test_re_selection_names_every_refused_frame_and_the_last(name: str) -> None:
    text = load_prompts(name).kfg_again("fox", 30, [(17, ""), (4, "")], "a field")
    assert [text.index(name) for name in ("17", "4")]
    assert re.search(r"\b29\b", text)  # the last of 30 frames, counted from 0
    assert "29" in load_prompts(name).kfg("fox", 30)


@pytest.mark.parametrize("name", SETS)
@settings(deadline=None)
@given(query=st.text(max_size=60), description=st.text(max_size=60))
def test_no_text_of_a_user_adds_media_or_fields(name: str, query: str, description: str) -> None:
    for text in all_turns(load_prompts(name), query, description).values():
        assert not re.search(r"<(image|video|audio)>", text)


@pytest.mark.parametrize("name", SETS)
def test_fields_inside_a_query_are_plain_text(name: str) -> None:
    for text in all_turns(load_prompts(name), NASTY, "field").values():
        assert "the $canvas {0} (image) %s $$ (think)" in text


def test_examples_in_the_full_set_are_answers_that_the_rewards_accept() -> None:
    prompts = load_prompts("qwen")
    aks = prompts.aks("d", "q").rsplit("like this:", 1)[1]
    assert parse_response(aks).answer == "A"
    for zero_target in (False, True):
        text = prompts.ktg("d", "q", zero_target=zero_target)
        parsed = parse_response(text.rsplit("like this:", 1)[1])
        grounding = parse_grounding(parsed.answer)
        assert parsed.well_formed
        assert [(i.box, i.point) for i in grounding.items] == [((10, 100, 200, 210), (105, 155))]


def test_ktg_prompts_name_the_canvas_in_pixels() -> None:
    assert "840 pixels" in load_prompts("qwen").ktg("d", "q")
    assert "112 pixels" in load_prompts("qwen").ktg("d", "q", canvas=112)


def test_user_turn_puts_the_media_first() -> None:
    assert user_turn("Describe.", "video") == "<video>Describe."
    assert user_turn("Find.", "image") == "<image>Find."


def test_a_users_set_is_loaded_by_path(tmp_path: Path) -> None:
    prompts = load_prompts(str(write(tmp_path, aks="$query? $$5 {a}", vdg="all $n_frames\n")))
    assert prompts.name == "own"
    assert prompts.aks("unused", "fox") == "fox? $5 {a}"
    assert prompts.vdg(3) == "all 3"


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"ktg": None}, "ktg", "missing"),
        ({"kfg": 3}, "kfg", "must be a text"),
        ({"aks": "$querry"}, "aks", "$querry"),
        ({"aks": "costs $5"}, "aks", "$$"),
        ({"vdg": "$query"}, "vdg", "known: n_frames"),
        ({"extra": "x"}, "extra", "unknown template"),
    ],
)
def test_an_error_in_a_set_names_file_and_template(
    tmp_path: Path, changes: dict[str, object], key: str, message: str
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        load_prompts(str(path))
    assert (caught.value.file, caught.value.key) == (str(path), key)
    assert message in caught.value.message


@pytest.mark.parametrize("content", ["- a\n", "a: [\n", "", "a: 2020-13-45"])
def test_files_that_are_not_a_set_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_prompts(str(path))
    assert caught.value.file == str(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(InputError, match="compact, qwen"):
        load_prompts("qwem")


@pytest.mark.parametrize("name", SETS)
def test_answer_only_prompts_ask_for_the_same_without_reasoning(name: str) -> None:
    plain = load_prompts(name, response="answer")
    asked = all_turns(plain, "the red fox", "a field at dawn")
    usual = all_turns(load_prompts(name), "the red fox", "a field at dawn")
    for task, text in asked.items():
        assert "think" not in text and "the red fox" in text
        if not task.startswith(("aks", "ktg")):
            assert text == usual[task]
    assert set(plain.templates) == set(load_prompts(name).templates)


def test_examples_of_the_answer_only_prompts_are_well_formed_answers() -> None:
    for task, text in all_turns(load_prompts("qwen", response="answer"), "q", "d").items():
        if task.startswith(("aks", "ktg")):
            example = text.rsplit("like this:", 1)[1]
            assert answer_only_faults(example) == ()
            answer = parse_response(example).answer
            assert answer == "A" if task == "aks" else parse_grounding(answer).n_items == 1


def test_a_set_without_answer_only_templates_is_refused_only_if_they_are_needed(
    tmp_path: Path,
) -> None:
    path = write(tmp_path)
    assert load_prompts(str(path)).templates["aks"] == "aks text"
    with pytest.raises(InputError, match=r"aks_answer: missing; data\.response=answer needs it"):
        load_prompts(str(path), response="answer")


def test_all_prompts_about_a_video_share_a_start_longer_than_a_cache_block() -> None:
    """The shipped tokenizer has one token per word or more."""
    prompts = load_prompts("qwen")
    seconds = FrameNames(tuple(i / 2 for i in range(6)))
    turns = [
        prompts.vdg(6),
        prompts.kfg("fox", 6),
        prompts.kfg_again("fox", 6, [(3, "hidden")], "a field"),
        prompts.kfg("fox", 6, names=seconds),
        prompts.kfg_again("fox", 6, [(3, "hidden")], "a field", names=seconds),
    ]
    words = [turn.split() for turn in turns]
    assert all(turn[:32] == words[0][:32] for turn in words)


def test_a_sample_of_the_video_is_announced() -> None:
    prompts = load_prompts("qwen")
    for text in (prompts.vdg(6, 100), prompts.kfg("fox", 6, 100)):
        assert "6 of the 100 frames" in text
    assert prompts.vdg(6, 6) == prompts.vdg(6)


def test_a_reselection_names_the_reason_of_each_refusal() -> None:
    text = load_prompts("qwen").kfg_again("fox", 30, [(17, "only grass"), (4, "")], "a field")
    assert "- 17: only grass\n- 4\n" in text
