"""Every silent difference between a trained model and its base is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import TINY
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training.model_compatibility import card_of, check_compatibility

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
    check_compatibility(TINY, trained, RECIPE)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer.json", new_token, "vocabulary differs"),
        ("processor_config.json", new_limits, "pixel limits differs"),
        ("rcot.json", lambda card: card.update(image_canvas=840), "image_canvas: is 840"),
        ("rcot.json", lambda card: card.update(prompts="qwen"), "prompts: is qwen"),
        ("rcot.json", lambda card: card.pop("video_canvas"), "video_canvas: is None"),
    ],
)
def test_a_difference_is_named(trained: Path, file: str, change, message: str) -> None:
    edit(trained / file, change)
    with pytest.raises(InputError) as error:
        check_compatibility(TINY, trained, RECIPE)
    assert message in str(error.value)


def test_another_chat_template_is_refused(trained: Path) -> None:
    with (trained / "chat_template.jinja").open("a") as file:
        file.write("{{ 'think first' }}")
    with pytest.raises(InputError, match="chat template differs"):
        check_compatibility(TINY, trained, RECIPE)


def test_a_model_without_a_card_is_refused(trained: Path) -> None:
    (trained / "rcot.json").unlink()
    with pytest.raises(InputError, match=r"rcot\.json"):
        check_compatibility(TINY, trained, RECIPE)
