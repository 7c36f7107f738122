"""The tiny policy's model, processor and inputs: Qwen2.5-VL with about 2.5 M parameters.

The architecture is unchanged: window attention, merger, M-RoPE and chat layout are those of
transformers; only sizes shrink. `to_patches` and `media_positions` are vectorized replacements for
slow steps of a training loop; tests compare them with the processor and the model.

Left out: gradient checkpointing, mixed precision, several images in one prompt.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from rcot_rl.tiny.tokenizer import END_OF_TEXT, END_OF_TURN, MAX_NUMBER, in_list

PATCH, MERGE, TEMPORAL = 14, 2, 2
IMAGE_CANVAS = 112
"""Side in pixels of the square image of AKS and KTG: 8 x 8 patches, 16 tokens."""
VIDEO_CANVAS = 112
"""Side in pixels of a video frame: 16 tokens for every two frames."""
LARGEST_SIDE = 224
"""Images up to this side stay unchanged; the processor shrinks larger ones."""

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

Media = Literal["image", "video"]
PositionRule = Literal["vllm", "transformers"]


@dataclass(frozen=True)
class PolicySize:
    """Widths and depths of the text model and of the vision tower."""

    hidden: int = 160
    layers: int = 5
    heads: int = 5
    intermediate: int = 448
    vision_hidden: int = 128
    vision_depth: int = 2
    vision_intermediate: int = 256
    vision_heads: int = 4


def build_model(
    tokenizer: PreTrainedTokenizerFast, size: PolicySize, seed: int
) -> Qwen2_5_VLForConditionalGeneration:
    """Return a new float32 model that depends only on `size` and `seed`.

    Weights start with standard deviation 0.06 (0.02 is too small for this width). Embeddings of
    numbers start on a smooth curve, so that similar coordinates have similar embeddings.
    """

    def token_id(token: str) -> int:
        return _token_id(tokenizer, token)

    half = size.hidden // size.heads // 2
    space = 3 * half // 8
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [half - 2 * space, space, space],
                "rope_theta": 1e4,
            },
            "initializer_range": 0.06,
            "tie_word_embeddings": True,
            "bos_token_id": token_id(END_OF_TEXT),
            "eos_token_id": token_id(END_OF_TURN),
            "pad_token_id": token_id(END_OF_TEXT),
        },
        vision_config={
            "depth": size.vision_depth,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "out_hidden_size": size.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "tokens_per_second": 1,
            "window_size": IMAGE_CANVAS,
            "fullatt_block_indexes": list(range(size.vision_depth)),
            "initializer_range": 0.06,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    _smooth_numbers(model, tokenizer)
    generation = model.generation_config
    generation.eos_token_id = [token_id(END_OF_TURN)]
    generation.pad_token_id = token_id(END_OF_TEXT)
    return model


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    index = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(index, int)  # a list only for a list of tokens
    return index


@torch.no_grad()
def _smooth_numbers(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    weight = model.get_input_embeddings().get_parameter("weight")
    half = weight.shape[1] // 2
    scale = torch.exp(torch.arange(half) / half * math.log(MAX_NUMBER / 6.0))
    for number in range(MAX_NUMBER + 1):
        angle = number / MAX_NUMBER * math.pi * scale
        row = torch.cat([angle.sin(), angle.cos()]) * 0.06
        weight[_token_id(tokenizer, str(number))] = row
        weight[_token_id(tokenizer, in_list(number))] += row


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    """Return Qwen2.5-VL's processor for the small canvases."""
    sizes = {
        "min_pixels": (PATCH * MERGE) ** 2,
        "max_pixels": LARGEST_SIDE**2,
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
    }
    video = Qwen2VLVideoProcessor(
        **{k: v for k, v in sizes.items() if not k.endswith("pixels")},
        size={"shortest_edge": sizes["min_pixels"], "longest_edge": 16 * sizes["max_pixels"]},
        do_sample_frames=False,
    )
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=video,
        chat_template=tokenizer.chat_template,
    )


def save_policy(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path
) -> None:
    """Write model, tokenizer and processor to `out`; each file is replaced atomically."""
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    build_processor(tokenizer).save_pretrained(partial)
    model.generation_config.save_pretrained(partial)
    card = {"prompts": "compact", "image_canvas": IMAGE_CANVAS, "video_canvas": VIDEO_CANVAS}
    (partial / "rcot.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        file.chmod(0o644)
        os.replace(file, out / file.name)
    partial.rmdir()


def to_patches(frames: np.ndarray) -> torch.Tensor:
    """Convert frames to patches, as Qwen2-VL's image and video processors do.

    Args:
        frames: uint8 [N, T, S, S, 3] RGB that needs no resizing; T is 1 for images, else even. An
            image is repeated to fill the temporal patch.

    Returns:
        float32 [N * T/2 * (S/14)^2, 1176].
    """
    count, time, side = frames.shape[:3]
    blocks = side // (PATCH * MERGE)
    pixels = (frames.astype(np.float32) / 255 - _MEAN) / _STD
    pixels = np.repeat(pixels, TEMPORAL, axis=1) if time == 1 else pixels
    steps = pixels.shape[1] // TEMPORAL
    pixels = pixels.reshape(
        count, steps, TEMPORAL, blocks, MERGE, PATCH, blocks, MERGE, PATCH, pixels.shape[-1]
    )
    ordered = pixels.transpose(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    rows = count * steps * (blocks * MERGE) ** 2
    return torch.from_numpy(np.ascontiguousarray(ordered).reshape(rows, -1))


def media_positions(
    steps: int, blocks: int, interval: float, after: PositionRule
) -> tuple[torch.Tensor, int]:
    """Return M-RoPE offsets of one image or video, and where the text after it continues.

    Args:
        steps: Temporal steps.
        blocks: Merged patches per side.
        interval: Distance of two temporal steps: tokens_per_second x seconds per step, 1 for
            images.
        after: vLLM continues after the largest position, transformers 5.9 after the height. Both
            agree for 8 frames of the canvas at interval 1, the only videos of the policy.

    Returns:
        (offsets int64 [3, steps * blocks^2], offset of the next text token)
    """
    time = torch.arange(steps).repeat_interleave(blocks * blocks)
    time = (time * interval).long()
    row = torch.arange(blocks).repeat_interleave(blocks).repeat(steps)
    column = torch.arange(blocks).repeat(blocks * steps)
    offsets = torch.stack([time, row, column])
    return offsets, blocks if after == "transformers" else int(offsets.max()) + 1


@dataclass(frozen=True)
class PolicyBatch:
    """Model inputs."""

    ids: torch.Tensor
    """int64 [B, L]"""
    mask: torch.Tensor
    """int64 [B, L], 1 for tokens that are not padding"""
    labels: torch.Tensor
    """int64 [B, L], -100 outside the responses"""
    positions: torch.Tensor
    """int64 [3, B, L]"""
    pixels: torch.Tensor
    """See `to_patches`."""
    grid: torch.Tensor
    """int64 [B, 3]: temporal, vertical and horizontal patches"""
    media: Media
    cells: torch.Tensor | None = None
    """int64 [B * tokens, 2 * 4, 7]: what `policy_data.cells_of` says about each merged patch."""


class PolicyEncoder:
    """Encode (user text, response, media) to batches, as processor and chat template do."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.pad = _token_id(tokenizer, END_OF_TEXT)
        self.eos = _token_id(tokenizer, END_OF_TURN)
        self.pad_of = {m: _token_id(tokenizer, f"<|{m}_pad|>") for m in get_args(Media)}
        self.placeholders = torch.tensor(list(self.pad_of.values()))

    def prompt(self, text: str, media: Media, tokens: int) -> list[int]:
        """Return token ids of one user turn up to the first token of the answer."""
        turn = (
            f"<|im_start|>user\n<|vision_start|>{f'<|{media}_pad|>' * tokens}<|vision_end|>"
            f"{text}<|im_end|>\n<|im_start|>assistant\n"
        )
        return self.tokenizer(turn, add_special_tokens=False)["input_ids"]

    def response(self, text: str) -> list[int]:
        """Return token ids of a response and its end of turn."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos]

    def batch(
        self,
        prompts: Sequence[str],
        responses: Sequence[str] | None,
        frames: np.ndarray,
        *,
        interval: float = 1,
        after: PositionRule = "vllm",
    ) -> PolicyBatch:
        """Encode a batch.

        Args:
            responses: Responses; without them, prompts are padded on the left.
            frames: uint8 [B, T, S, S, 3] RGB, T = 1 for images.
        """
        time, side = frames.shape[1:3]
        media: Media = "image" if time == 1 else "video"
        steps, blocks = max(1, time // TEMPORAL), side // (PATCH * MERGE)
        questions = [self.prompt(p, media, steps * blocks * blocks) for p in prompts]
        answers = [[] for _ in prompts] if responses is None else [*map(self.response, responses)]
        length = max(len(q) + len(a) for q, a in zip(questions, answers, strict=True))
        ids = torch.full((len(prompts), length), self.pad)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        positions = torch.zeros(3, *ids.shape, dtype=torch.long)
        offsets, extent = media_positions(steps, blocks, interval, after)
        for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            tokens = question + answer
            start = length - len(tokens) if responses is None else 0
            stop = start + len(tokens)
            ids[row, start:stop] = torch.tensor(tokens)
            mask[row, start:stop] = 1
            if answer:
                labels[row, start + len(question) : stop] = torch.tensor(answer)
            before = question.index(self.pad_of[media])
            rest = len(tokens) - before - offsets.shape[1]
            positions[:, row, start:stop] = torch.cat(
                [
                    torch.arange(before).expand(3, -1),
                    offsets + before,
                    torch.arange(rest).expand(3, -1) + before + extent,
                ],
                dim=1,
            )
        grid = torch.tensor([[steps, side // PATCH, side // PATCH]] * len(prompts))
        return PolicyBatch(ids, mask, labels, positions, to_patches(frames), grid, media)


def hidden_states(
    model: Qwen2_5_VLForConditionalGeneration, batch: PolicyBatch, *, use_cache: bool = False
) -> Any:
    """Return the backbone's output (transformers' ModelOutput) for a batch."""
    name = "" if batch.media == "image" else "_videos"
    return model.model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        **{f"pixel_values{name}": batch.pixels, f"{batch.media}_grid_thw": batch.grid},
        use_cache=use_cache,
    )
