"""The pixel contract on real rows: the policy's processor reads them and resizes nothing.

The only module here that needs transformers, and so torch; used by `rcot data check --model`.
Compares the stored token counts with the processor's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_pipelines.tokens import IMAGE, typed_parts
from data_pipelines.verify.show import Shown, read_shown
from rcot_rl.errors import InputError
from rcot_rl.protocol.control_tokens import control_tokens, extra_control_tokens

ROWS = 8
"""Rows of each shard that the processor reads, of all kinds."""


class PolicyProcessor:
    """The processor of one model folder."""

    def __init__(self, model: Path) -> None:
        """Load the processor; InputError if transformers cannot."""
        from transformers import AutoProcessor

        try:
            self._processor = AutoProcessor.from_pretrained(model)
            added = self._processor.tokenizer.added_tokens_decoder.values()
        except Exception as error:  # transformers raises many types for broken files
            raise InputError(f"no readable processor: {_reason(error)}", file=model) from error
        self.extra_control = extra_control_tokens(added)
        """Control tokens of its tokenizer that the static pattern does not know."""

    def faults(self, shard: Path) -> Iterator[tuple[int | None, str, str]]:
        """Yield (row, key, message) of every fault; the row is None if the fault is the file's."""
        try:
            rows = read_shown(shard, limit=ROWS, varied=True)
        except InputError as error:
            yield (error.line, error.key or "", error.message)
            return
        for shown in rows:
            if shown.prompt.count(IMAGE) != 1 or control_tokens(
                shown.prompt.replace(IMAGE, "", 1), self.extra_control, keep_tags=True
            ):
                continue  # reported by `check_rows`; the processor would count its media
            try:
                yield from self._faults(shown)
            except Exception as error:  # the type depends on the row's text
                yield (shown.number, "prompt", f"the processor refuses it: {_reason(error)}")

    def _faults(self, shown: Shown) -> Iterator[tuple[int, str, str]]:
        processor, patch = self._processor, self._processor.image_processor.patch_size
        text = processor.apply_chat_template(
            [{"role": "user", "content": typed_parts(shown.prompt)}],
            tokenize=False,
            add_generation_prompt=True,
        )
        inputs = processor(text=[text], images=[shown.image], return_tensors="np")
        _, rows, columns = (int(v) for v in inputs["image_grid_thw"][0])
        size = (rows * patch, columns * patch)
        if size != (shown.image.height, shown.image.width):
            yield (
                shown.number,
                "images[0]",
                f"the processor makes {size[0]} x {size[1]} pixels of "
                f"{shown.image.height} x {shown.image.width}",
            )
        stored, counted = shown.info.get("prompt_tokens"), int(inputs["input_ids"].shape[1])
        if stored is not None and stored != counted:
            message = f"{stored}, but the processor makes {counted}"
            yield (shown.number, "extra_info.prompt_tokens", message)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
