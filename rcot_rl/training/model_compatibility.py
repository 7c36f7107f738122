"""Check what every stage must share with the one before, wherever a model is passed on.

A tokenizer, chat template or pixel limit that changes between SFT, GRPO and inference raises no
error anywhere: the policy is asked something else than it was trained on. This check reads a few
JSON files. That the merged model computes what the adapter did is checked by `merge_adapter.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines.tokens import pixel_limits, read_template, read_tokenizer
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe
from rcot_rl.system.files import read_json_object

CARD = "rcot.json"

_SHARED: dict[str, Callable[[Path], Any]] = {
    "vocabulary": lambda model: read_tokenizer(model)[0].get_vocab(with_added_tokens=True),
    "chat template": lambda model: read_template(model)[1].strip(),
    "pixel limits": pixel_limits,
}


def card_of(recipe: Recipe) -> dict[str, Any]:
    """Return `rcot.json`: the prompts and canvases of a model trained by this recipe."""
    return {
        "prompts": recipe.prompts,
        "response": recipe.data.response,
        "image_canvas": recipe.canvas.image,
        "video_canvas": recipe.canvas.video,
    }


def check_compatibility(base: Path, trained: Path, recipe: Recipe) -> None:
    """Raise InputError unless `trained` reads prompts and images as `base`, and has its card."""
    for name, read in _SHARED.items():
        if read(base) != read(trained):
            raise InputError(f"{name} differs from the base model {base}", file=trained)
    file = trained / CARD
    card = {"response": "think_answer"} | read_json_object(file)  # earlier cards lack the key
    for key, expected in card_of(recipe).items():
        value = card.get(key)
        if value != expected:
            raise InputError(f"is {value}, but the recipe has {expected}", file=file, key=key)
