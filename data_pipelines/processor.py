"""The pixel contract on real rows: the policy's own processor takes them, and resizes nothing.

The one place of this room that needs transformers, and so torch: `rcot data check --model` asks for
it. Stored token counts are held against what the processor returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_pipelines.show import Shown, read_shown
from data_pipelines.tokens import IMAGE

ROWS = 8
"""Rows of each shard that the processor takes, of all kinds."""


def processor_faults(shard: Path, model: Path) -> Iterator[tuple[int, str, str]]:
    """(row, key, message) of every fault that the processor of `model` shows.

    Raises InputError for an unreadable shard.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    patch = processor.image_processor.patch_size
    for shown in read_shown(shard, limit=ROWS, varied=True):
        text = processor.apply_chat_template(
            _turns(shown), tokenize=False, add_generation_prompt=True
        )
        taken = processor(text=[text], images=[shown.image], return_tensors="np")
        _, rows, columns = (int(v) for v in taken["image_grid_thw"][0])
        size = (rows * patch, columns * patch)
        if size != (shown.image.height, shown.image.width):
            yield (
                shown.number,
                "images[0]",
                f"the processor makes {size[0]} x {size[1]} pixels of "
                f"{shown.image.height} x {shown.image.width}",
            )
        counted, found = shown.info.get("prompt_tokens"), int(taken["input_ids"].shape[1])
        if counted is not None and counted != found:
            message = f"{counted}, the processor makes {found}"
            yield (shown.number, "extra_info.prompt_tokens", message)


def _turns(shown: Shown) -> list[dict[str, object]]:
    parts: list[dict[str, str]] = []
    for number, text in enumerate(shown.prompt.split(IMAGE)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return [{"role": "user", "content": parts}]
