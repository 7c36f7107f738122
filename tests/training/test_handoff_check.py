"""The hand-off: every change that would pass in silence is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import TINY
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training.handoff_check import card_of, check_handoff

RECIPE = load_recipe("laptop")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / "rcot.json").write_text(json.dumps(card_of(RECIPE)))
    return folder


def edit(file: Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def new_limits(value: dict) -> None:
    value["image_processor"]["size"]["longest_edge"] = 602_112


def new_token(value: dict) -> None:
    value["added_tokens"].append(value["added_tokens"][-1] | {"id": 99_999, "content": "<|new|>"})


def test_a_trained_copy_passes(trained: Path) -> None:
    check_handoff(TINY, trained, RECIPE)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("tokenizer.json", new_token, "another vocabulary"),
        ("processor_config.json", new_limits, "another limits of pixels"),
        ("rcot.json", lambda card: card.update(image_canvas=840), "image_canvas: is 840"),
        ("rcot.json", lambda card: card.update(prompts="qwen"), "prompts: is qwen"),
        ("rcot.json", lambda card: card.pop("video_canvas"), "video_canvas: is None"),
    ],
)
def test_what_differs_is_named(trained: Path, file: str, change, says: str) -> None:
    edit(trained / file, change)
    with pytest.raises(InputError) as error:
        check_handoff(TINY, trained, RECIPE)
    assert says in str(error.value)


def test_another_chat_template(trained: Path) -> None:
    with (trained / "chat_template.jinja").open("a") as file:
        file.write("{{ 'think first' }}")
    with pytest.raises(InputError, match="another chat template"):
        check_handoff(TINY, trained, RECIPE)


def test_no_card(trained: Path) -> None:
    (trained / "rcot.json").unlink()
    with pytest.raises(InputError, match=r"rcot\.json"):
        check_handoff(TINY, trained, RECIPE)
