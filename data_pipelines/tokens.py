"""Exact token counts of rows, and the pixel contract, from the policy's own files.

Reads `tokenizer.json`, the chat template and the processor's configuration as transformers does,
without importing transformers: a build needs no torch. Tests compare the results with
transformers'.

Pixel contract: the model's processor must not resize an image of the canvas. Otherwise boxes, which
are in canvas pixels, would be learned on an image of another size (840 becomes 756 under the widely
copied limit of 602,112 pixels).

Control tokens: a row's conversation holds those of the chat template and no others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rcot_rl.errors import InputError
from rcot_rl.protocol.control_tokens import control_ids, extra_control_tokens, surplus_tokens
from rcot_rl.system.files import read_json_object

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

IMAGE = "<image>"
_PAD = "<|image_pad|>"
"""What the chat template inserts for an image; the processor repeats it for each vision token."""
_LETTER = {"type": "text", "text": "x"}


class Lengths(NamedTuple):
    """Token counts of a row."""

    vision: int
    prompt: int
    """Including vision tokens and the header of the assistant's turn, as in a rollout."""
    total: int
    """The whole conversation, as in SFT; equal to `prompt` if there is no response."""


@dataclass(frozen=True)
class PixelLimits:
    """Which images the model's processor leaves at their size."""

    cell: int
    """Side of one vision token in pixels: patch size x merge size."""
    least: int
    most: int
    """Minimum and maximum number of pixels of an image that is not resized."""

    def vision_tokens(self, height: int, width: int) -> int:
        """Return the number of vision tokens of an image; ValueError if it would be resized."""
        if height % self.cell or width % self.cell:
            raise ValueError(
                f"{height} x {width} is no multiple of {self.cell} pixels: it would be resized"
            )
        if not self.least <= height * width <= self.most:
            raise ValueError(
                f"{height} x {width} = {height * width} pixels is outside of the processor's "
                f"{self.least} to {self.most}: it would be resized"
            )
        return (height // self.cell) * (width // self.cell)


class TokenCounter:
    """Counts the tokens of rows for one model folder."""

    def __init__(self, model: Path) -> None:
        """Read the model's files; InputError if one is missing or invalid."""
        self.model = model
        self.limits = pixel_limits(model)
        self._tokenizer, tokenizer_sha = read_tokenizer(model)
        self._template, template_text = read_template(model)
        added = self._tokenizer.get_added_tokens_decoder()
        self.extra_control = extra_control_tokens(added.values())
        """Control tokens of this tokenizer that the static pattern does not know."""
        self._control = control_ids(added)
        self._template_ids: dict[tuple[bool, int, int], list[int]] = {}
        text = json.dumps([tokenizer_sha, template_text, vars(self.limits)])
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        """Changes whenever any count may change."""

    def lengths(
        self, prompt: Sequence[Mapping[str, str]], response: str | None, canvas: int
    ) -> Lengths:
        """Count the tokens of a row with one image of `canvas` x `canvas` pixels.

        Raises InputError.

        Args:
            prompt: The row's turns, with `<image>` in place of the image.
            response: The assistant's turn of an SFT row.
        """
        vision = self.vision_tokens(canvas)
        turns = [{"role": t["role"], "content": typed_parts(t["content"])} for t in prompt]
        n_prompt = self._count(turns, True, vision)
        if response is None:
            return Lengths(vision, n_prompt, n_prompt)
        turns.append({"role": "assistant", "content": typed_parts(response)})
        return Lengths(vision, n_prompt, self._count(turns, False, vision))

    def vision_tokens(self, canvas: int) -> int:
        """Return the number of vision tokens of the canvas; InputError if it would be resized."""
        try:
            return self.limits.vision_tokens(canvas, canvas)
        except ValueError as error:
            raise InputError(str(error), file=self.model, key="canvas") from error

    def _count(self, turns: list[dict[str, Any]], generate: bool, vision: int) -> int:
        text = self._template.render(messages=turns, add_generation_prompt=generate)
        ids = self._tokenizer.encode(text).ids
        surplus = surplus_tokens(ids, self._without_text(turns, generate), self._control)
        if surplus:
            raise InputError(
                f"a row's text holds the control token {', '.join(map(repr, surplus))} of this "
                "tokenizer; remove it from the expression, description or trace",
                file=self.model / "tokenizer.json",
            )
        return len(ids) + text.count(_PAD) * (vision - 1)

    def _without_text(self, turns: list[dict[str, Any]], generate: bool) -> list[int]:
        """Return the token ids of the same turns and images, with one letter for each text."""
        n_images = sum(part["type"] == "image" for turn in turns for part in turn["content"])
        key = (generate, len(turns), n_images)
        if key not in self._template_ids:
            bare = [
                {
                    **turn,
                    "content": [p if p["type"] == "image" else _LETTER for p in turn["content"]],
                }
                for turn in turns
            ]
            text = self._template.render(messages=bare, add_generation_prompt=generate)
            self._template_ids[key] = self._tokenizer.encode(text).ids
        return self._template_ids[key]


def token_statistics(
    lengths: Mapping[str, Sequence[Sequence[int] | None]],
    limits: Mapping[str, int],
    counter: TokenCounter | None,
) -> dict[str, Any] | None:
    """Return the manifest's token statistics of a set; None if tokens were not counted.

    Args:
        lengths: split -> `Lengths` of each row.
        limits: Maximum `prompt_tokens` and `total_tokens` that training accepts.
    """
    if counter is None:
        return None
    splits = {}
    for split, listed in lengths.items():
        counted = [Lengths(*length) for length in listed if length is not None]
        if counted:
            splits[split] = {
                f"{name}_tokens": _distribution([getattr(length, name) for length in counted])
                for name in Lengths._fields
            }
    over = {
        f"{name}_tokens": [
            f"{split}:{row}"
            for split, listed in lengths.items()
            for row, length in enumerate(listed)
            if length is not None and getattr(Lengths(*length), name) > limit
        ]
        for name in Lengths._fields
        if (limit := limits.get(f"{name}_tokens")) is not None
    }
    return {
        "model": counter.digest,
        "pixels": vars(counter.limits),
        "splits": splits,
        "limits": dict(limits),
        "over": over,
    }


def _distribution(values: list[int]) -> dict[str, Any]:
    """Return minimum, mean, maximum, and a histogram of ten bins as [from, to, rows]."""
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // 10))
    bins = [0] * 10
    for value in values:
        bins[(value - low) // width] += 1
    histogram = [[low + i * width, low + (i + 1) * width - 1, n] for i, n in enumerate(bins)]
    return {
        "least": low,
        "mean": round(sum(values) / len(values), 2),
        "most": high,
        "histogram": histogram,
    }


def pixel_limits(model: Path) -> PixelLimits:
    """Read the limits from the processor's configuration in a model folder. Raises InputError."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = model / name
        if path.is_file():
            config = read_json_object(path)
            config = config.get("image_processor", config)
            break
    else:
        raise InputError(
            "the model folder has no preprocessor_config.json or processor_config.json", file=model
        )
    size = config.get("size") or {}
    least = config.get("min_pixels", size.get("shortest_edge"))
    most = config.get("max_pixels", size.get("longest_edge"))
    numbers = (config.get("patch_size"), config.get("merge_size"), least, most)
    if not all(type(v) is int and v > 0 for v in numbers):
        raise InputError(
            "needs patch_size, merge_size, and min_pixels and max_pixels (or size) as positive "
            "integers",
            file=path,
        )
    patch, merge, least, most = numbers
    return PixelLimits(patch * merge, least, most)


def read_tokenizer(model: Path) -> tuple[Tokenizer, str]:
    """Return the folder's tokenizer and the sha256 of its file. Raises InputError."""
    from tokenizers import Tokenizer

    path = model / "tokenizer.json"
    try:
        raw = path.read_bytes()
        return Tokenizer.from_buffer(raw), hashlib.sha256(raw).hexdigest()
    except OSError as error:
        raise InputError("no tokenizer at this path of the model folder", file=path) from error
    except Exception as error:  # the Rust library raises bare exceptions
        raise InputError(f"not a tokenizer: {error}", file=path) from error


def read_template(model: Path) -> tuple[Template, str]:
    """Return the folder's chat template, compiled, and its source text. Raises InputError."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path = model / "chat_template.jinja"
    if path.is_file():
        text: Any = path.read_text(encoding="utf-8")
    else:
        candidates = [model / n for n in ("chat_template.json", "tokenizer_config.json")]
        path = next(
            (p for p in candidates if p.is_file() and "chat_template" in read_json_object(p)),
            candidates[0],
        )
        text = read_json_object(path).get("chat_template") if path.is_file() else None
    if not isinstance(text, str):
        raise InputError("no chat template in the model folder", file=path)
    # the options of transformers' renderer
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(text), text
    except TemplateError as error:
        raise InputError(f"not a chat template: {error}", file=path) from error


def typed_parts(content: str) -> list[dict[str, str]]:
    """Split content into typed parts at the media placeholder, as verl does."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts
