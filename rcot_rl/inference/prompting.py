"""From a request to vLLM's input: the chat template, the media, and checks before generation.

vLLM leaves these to its caller:

- Media that the processor would resize are refused, because boxes are in pixels of the canvas.
- Frame rates are passed as the processor's `video_metadata`. For Qwen2.5-VL, metadata passed with
  the frames is dropped, and all frames then share one temporal position.
- Image and video placeholders are never sampled, as in training.
- Control tokens in any text are neutralized (`rcot_rl.protocol.control_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rcot_rl.errors import InputError
from rcot_rl.inference.frame_budget import TEMPLATE_TOKENS
from rcot_rl.inference.policy import Sampling
from rcot_rl.protocol.control_tokens import (
    control_ids,
    extra_control_tokens,
    neutralize,
    surplus_tokens,
)
from rcot_rl.protocol.row_clips import video_metadata
from rcot_rl.recipe.inference_section import EngineSection

DEFAULT_MODEL_LEN = 32768
CPU_KV_CACHE_BYTES = 256 << 20
Media = Literal["image", "video"]


class Prompter:
    """The processor of a checkpoint folder, and its limits."""

    def __init__(self, model: Path, max_model_len: int | None = None) -> None:
        """Load the processor.

        Args:
            max_model_len: Maximum number of tokens; None: 32768, or the model's largest position if
                that is smaller.
        """
        from transformers import AutoConfig, AutoProcessor

        self.model = model
        self.text_config = AutoConfig.from_pretrained(model).get_text_config()
        positions = self.text_config.max_position_embeddings
        self.max_model_len = max_model_len or min(DEFAULT_MODEL_LEN, positions)
        self.processor = AutoProcessor.from_pretrained(model)
        tokenizer = self.processor.tokenizer
        self.placeholders = [
            tokenizer.convert_tokens_to_ids(getattr(self.processor, f"{media}_token"))
            for media in ("image", "video")
        ]
        added = tokenizer.added_tokens_decoder
        self.extra_tokens = extra_control_tokens(added.values())
        """Control tokens of this tokenizer that the static pattern does not cover."""
        self._control = control_ids(added)
        self._template_ids: dict[Media, list[int]] = {}

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        text = neutralize(text, self.extra_tokens, keep_tags=True)
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, text: str, media: Media, size: tuple[int, int], n_frames: int = 1) -> str:
        """Return the whole prompt of one user turn about one image or video.

        Args:
            size: (H, W) of the image or frames, in pixels.

        Raises:
            InputError: The processor would resize the medium, the prompt leaves no room in
                `max_model_len`, or a control token cannot be neutralized.
        """
        prompt = self._rendered(neutralize(text, self.extra_tokens, keep_tags=True), media)
        ids = self.processor.tokenizer(prompt)["input_ids"]
        self._check_control(ids, media)
        self._check_length(len(ids), self.media_tokens(media, size, n_frames))
        return prompt

    def params(self, sampling: Sampling, seed: int | None) -> dict[str, Any]:
        """Return the arguments of vLLM's SamplingParams."""
        greedy = sampling.temperature == 0
        return {
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": 1.0 if greedy else sampling.top_p,
            "top_k": -1 if greedy else sampling.top_k,
            "max_tokens": sampling.max_tokens,
            "seed": None if greedy else seed,
            "logit_bias": {token: float("-inf") for token in self.placeholders},
            "logprob_token_ids": self.option_ids(sampling.options) or None,
        }

    def option_ids(self, options: Sequence[str]) -> list[int]:
        """Return the token of each option. Raises InputError if an option is not one token."""
        ids = [self.processor.tokenizer.encode(o, add_special_tokens=False) for o in options]
        for option, tokens in zip(options, ids, strict=True):
            if len(tokens) != 1:
                raise InputError(
                    f"the tokenizer splits the option {option} into {len(tokens)} tokens, so that "
                    "it has no probability of its own",
                    file=self.model,
                )
        return [tokens[0] for tokens in ids]

    def most_frames(self, size: tuple[int, int], text_tokens: int) -> int:
        """Return the number of frames of `size` (H, W) that fit beside `text_tokens` tokens."""
        step = self.processor.video_processor.temporal_patch_size
        room = self.max_model_len - text_tokens - TEMPLATE_TOKENS
        return step * (room // self.media_tokens("video", size, step))

    def _rendered(self, text: str, media: Media) -> str:
        content = [{"type": media}, {"type": "text", "text": text}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def _check_control(self, ids: list[int], media: Media) -> None:
        if media not in self._template_ids:
            template = self.processor.tokenizer(self._rendered("x", media))["input_ids"]
            self._template_ids[media] = template
        surplus = surplus_tokens(ids, self._template_ids[media], self._control)
        if surplus:
            raise InputError(
                f"a prompt contains the tokenizer's control token "
                f"{', '.join(map(repr, surplus))}, which cannot be neutralized; remove it from the "
                "expression or description",
                file=self.model,
            )

    def media_tokens(self, media: Media, size: tuple[int, int], n_frames: int) -> int:
        """Return the number of tokens of an image or video of `size` (H, W). Raises InputError."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        if media == "image":
            processor, steps = self.processor.image_processor, 1
        else:
            processor = self.processor.video_processor
            steps = -(-n_frames // processor.temporal_patch_size)
        height, width = size
        cell = processor.patch_size * processor.merge_size
        low, high = processor.size["shortest_edge"], processor.size["longest_edge"]
        resized = smart_resize(height, width, cell, low, high)
        if resized != (height, width):
            raise InputError(
                f"the model's processor would resize {height} x {width} pixels to "
                f"{resized[0]} x {resized[1]}; choose a canvas that it does not resize",
                file=self.model,
                key="canvas",
            )
        return steps * (height // cell) * (width // cell)

    def _check_length(self, text_tokens: int, media_tokens: int) -> None:
        length = text_tokens + media_tokens
        if length >= self.max_model_len:
            raise InputError(
                f"a prompt has {length} tokens, {media_tokens} of them image or video, and the "
                f"limit is {self.max_model_len}; raise it, or set predict.max_frames",
                key="engine.max_model_len",
            )


def video_arguments(n_frames: int, fps: float) -> dict[str, Any]:
    """Return the `mm_processor_kwargs` that keep the frames' temporal positions."""
    return {
        "video_metadata": [video_metadata(n_frames, fps)],
        "do_sample_frames": False,
    }


def engine_arguments(section: EngineSection, device: str, prompter: Prompter) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM` or `AsyncEngineArgs`, without model folder and seed."""
    arguments: dict[str, Any] = {
        "dtype": section.dtype,
        "max_model_len": prompter.max_model_len,
        "max_num_seqs": section.max_num_seqs,
        "max_num_batched_tokens": section.max_num_batched_tokens,
        "gpu_memory_utilization": section.gpu_memory_utilization,
        "enforce_eager": section.enforce_eager,
        "tensor_parallel_size": section.tensor_parallel_size,
        "enable_prefix_caching": section.enable_prefix_caching,
        "limit_mm_per_prompt": {"image": 1, "video": 1},
        "trust_remote_code": False,
    }
    if section.kv_cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = section.kv_cache_bytes
    if device == "cpu":
        length = prompter.max_model_len
        arguments |= {
            "dtype": "float32" if section.dtype == "auto" else section.dtype,
            "enforce_eager": True,
            # vLLM's 128 would exceed a prompt's common start; multiples of 32 are fast
            "block_size": 32,
            # a seeded request with a chunked prompt fails: vLLM rewinds its generator after each
            # chunk, and torch's CPU generator has no offset to rewind
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(section.max_num_batched_tokens, length),
            "kv_cache_memory_bytes": section.kv_cache_bytes
            or max(CPU_KV_CACHE_BYTES, _cache_bytes(prompter.text_config, length)),
            "skip_mm_profiling": True,  # otherwise 16 images of the largest size are encoded first
        }
    return arguments | section.vllm


def _cache_bytes(text_config: Any, tokens: int) -> int:
    """Return the bytes of float32 keys and values of one sequence, plus 10 % for blocks."""
    heads = text_config.num_key_value_heads
    head_dim = text_config.hidden_size // text_config.num_attention_heads
    return int(1.1 * 2 * 4 * text_config.num_hidden_layers * heads * head_dim * tokens)
