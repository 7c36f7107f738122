"""Prompt sets: the texts that reach the policy, and how a broken set is reported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rcot_rl.errors import InputError
from rcot_rl.protocol.grounding import parse_grounding
from rcot_rl.protocol.parser import parse_response
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
        "kfg_again": prompts.kfg_again(query, 6, [3, 1], description),
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
    text = load_prompts(name).kfg_again("fox", 30, [17, 4], "a field")
    assert "17, 4" in text
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
