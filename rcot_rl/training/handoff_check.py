"""What every stage must share with the one before: checked wherever a model is handed on.

A tokenizer, chat template or pixel limit that changes between SFT, GRPO and inference raises no
error anywhere; the policy is merely asked something else than it was taught. That the merged model
computes what the adapter did is `merge.py`'s check; this one reads a few files of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines.tokens import pixel_limits, read_template, read_tokenizer
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe

CARD = "rcot.json"

_SHARED: dict[str, Callable[[Path], Any]] = {
    "vocabulary": lambda model: read_tokenizer(model)[0].get_vocab(with_added_tokens=True),
    "chat template": lambda model: read_template(model)[1].strip(),
    "limits of pixels": pixel_limits,
}


def card_of(recipe: Recipe) -> dict[str, Any]:
    """`rcot.json`: the prompts and canvases that a model trained by this recipe knows."""
    return {
        "prompts": recipe.prompts,
        "image_canvas": recipe.canvas.image,
        "video_canvas": recipe.canvas.video,
    }


def check_handoff(base: Path, trained: Path, recipe: Recipe) -> None:
    """Raise InputError, naming what differs, unless `trained` reads prompts and images as `base`
    does, and knows the recipe's prompts and canvases."""
    for what, read in _SHARED.items():
        if read(base) != read(trained):
            raise InputError(f"has another {what} than the base model {base}", file=trained)
    file = trained / CARD
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"not readable as JSON: {error}", file=file) from error
    for key, expected in card_of(recipe).items():
        if not isinstance(card, dict) or card.get(key) != expected:
            found = card.get(key) if isinstance(card, dict) else None
            raise InputError(f"is {found}, and the recipe's {expected}", file=file, key=key)
