"""The pixel contract on real rows: the policy's own processor takes them, and resizes nothing.

The one place of this room that needs transformers, and so torch: `rcot data check --model` asks for
it. Stored token counts are held against what the processor returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_pipelines.tokens import IMAGE
from data_pipelines.verify.show import Shown, read_shown
from rcot_rl.errors import InputError
from rcot_rl.protocol.control_tokens import control_tokens, own_tokens

ROWS = 8
"""Rows of each shard that the processor takes, of all kinds."""


class PolicyProcessor:
    """The processor of one model folder."""

    def __init__(self, model: Path) -> None:
        """Raises InputError for a folder whose processor transformers cannot load."""
        from transformers import AutoProcessor

        try:
            self._processor = AutoProcessor.from_pretrained(model)
            added = self._processor.tokenizer.added_tokens_decoder.values()
        except Exception as error:  # transformers raises many kinds for broken files
            raise InputError(f"has no readable processor: {_reason(error)}", file=model) from error
        self.own = own_tokens(added)
        """Control tokens of its tokenizer that the static pattern does not know."""

    def faults(self, shard: Path) -> Iterator[tuple[int | None, str, str]]:
        """(row, key, message) of every fault that the processor shows; row None: of the file."""
        try:
            rows = read_shown(shard, limit=ROWS, varied=True)
        except InputError as error:
            yield (error.line, error.key or "", error.message)
            return
        for shown in rows:
            if shown.prompt.count(IMAGE) != 1 or control_tokens(
                shown.prompt.replace(IMAGE, "", 1), self.own, keep_tags=True
            ):
                continue  # `check_rows` has reported the row, and the processor would count media
            try:
                yield from self._faults(shown)
            except Exception as error:  # what a processor raises depends on the row's text
                yield (shown.number, "prompt", f"the processor refuses it: {_reason(error)}")

    def _faults(self, shown: Shown) -> Iterator[tuple[int, str, str]]:
        processor, patch = self._processor, self._processor.image_processor.patch_size
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


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _turns(shown: Shown) -> list[dict[str, object]]:
    parts: list[dict[str, str]] = []
    for number, text in enumerate(shown.prompt.split(IMAGE)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return [{"role": "user", "content": parts}]
