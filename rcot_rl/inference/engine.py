"""The policy behind vLLM's offline engine: requests in, texts out, weights swapped in place.

One engine serves a whole prediction run, and several checkpoints of one network one after the
other, since starting it costs more than anything a small model does with it. On a CPU the engine
lives in this process; on a GPU it is vLLM's usual one.

Three things that vLLM leaves to its caller are settled here. What the processor would resize is
refused, because boxes are in pixels of the canvas. Frame rates are passed as the processor's
`video_metadata`: metadata given with the frames is dropped for Qwen2.5-VL, and all frames then
share one temporal position. Image and video placeholders are never sampled, as in training.

Left out: asynchronous serving, LoRA adapters, several images or videos in one prompt.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import check_model, check_same_model
from rcot_rl.inference.policy import Request, Sampling
from rcot_rl.recipe.inference import EngineSection

DEFAULT_MODEL_LEN = 32768
CPU_KV_CACHE_BYTES = 256 << 20

_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is the command's own
    "TOKENIZERS_PARALLELISM": "false",
}
_CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would outlive the engine in this process
    "VLLM_CPU_KVCACHE_SPACE": None,  # whole GiB only, and overrides kv_cache_memory_bytes
}

_LEFT_BEHIND = ("LD_PRELOAD", "LOCAL_WORLD_SIZE")
"""Variables that vLLM sets in this process for workers that it does not start; so all VLLM_*."""


class PolicyEngine:
    """A Qwen2.5-VL checkpoint in a running vLLM engine. A context manager: closed, it leaves
    neither processes nor memory."""

    def __init__(
        self,
        model: Path,
        section: EngineSection,
        *,
        device: Literal["cpu", "cuda"] = "cuda",
        seed: int = 0,
    ) -> None:
        """Start the engine on the checkpoint folder `model`.

        Raises InputError for a folder that is not a whole checkpoint (before vLLM is imported) and
        for settings that vLLM refuses.
        """
        check_model(model)
        self.model = model
        self.section = section
        self.device = device
        self._environment: dict[str, str] | None = None
        self._llm: Any = None
        self._start(seed)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[str]]:
        """`sampling.n` responses for each request, in order, special tokens removed.

        Raises InputError for an image or frame that the model's processor would resize, and for a
        prompt longer than `max_model_len`.
        """
        if not requests:
            return []
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        prompts = [self._prompt(request) for request in requests]
        params = [self._params(sampling, request.seed) for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [[choice.text for choice in output.outputs] for output in outputs]

    def load_checkpoint(self, path: Path) -> None:
        """Replace the weights in place by those of another checkpoint of the same network.

        Every cache that holds something computed from the old weights is emptied. Raises
        InputError, with the engine unharmed, for a folder that is not whole or of another network,
        tokenizer or set of tensors.
        """
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        check_model(path)
        check_same_model(self.model, path)
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        except BaseException:
            self.close()  # half-loaded weights must not answer
            raise
        if not self._llm.reset_prefix_cache():
            self.close()
            raise RuntimeError("vLLM did not empty its prefix cache after a weight swap")
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        self.model = path

    def close(self) -> None:
        """Stop the engine and give its memory back; harmless when closed."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            if self.device == "cpu":
                from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

                cleanup_dist_env_and_memory()
            gc.collect()
        if self._environment is not None:
            ours = {*_ENVIRONMENT, *_CPU_ENVIRONMENT, *_LEFT_BEHIND}
            for name in {*os.environ, *self._environment}:
                if name in ours or name.startswith("VLLM_"):
                    _set_variable(name, self._environment.get(name))
            self._environment = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, seed: int) -> None:
        wanted = _ENVIRONMENT | (_CPU_ENVIRONMENT if self.device == "cpu" else {})
        self._environment = dict(os.environ)
        for name, value in wanted.items():
            _set_variable(name, value)
        from transformers import AutoConfig, AutoProcessor

        text_config = AutoConfig.from_pretrained(self.model).get_text_config()
        positions = text_config.max_position_embeddings
        self.max_model_len = self.section.max_model_len or min(DEFAULT_MODEL_LEN, positions)
        self._processor = AutoProcessor.from_pretrained(self.model)
        tokenizer = self._processor.tokenizer
        self._placeholders = [
            tokenizer.convert_tokens_to_ids(getattr(self._processor, f"{media}_token"))
            for media in ("image", "video")
        ]
        self._special = sorted(
            (t.content for t in tokenizer.added_tokens_decoder.values() if t.special),
            key=len,
            reverse=True,
        )
        from vllm import LLM

        try:
            self._llm = LLM(str(self.model), seed=seed, **self._arguments(text_config))
        except ValueError as error:
            self.close()
            reason = " ".join(str(error).split())
            raise InputError(
                f"vLLM refused the engine's settings: {reason}", key="engine"
            ) from error
        except BaseException:
            self.close()
            raise

    def _arguments(self, text_config: Any) -> dict[str, Any]:
        section = self.section
        arguments: dict[str, Any] = {
            "dtype": section.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": section.max_num_seqs,
            "max_num_batched_tokens": section.max_num_batched_tokens,
            "gpu_memory_utilization": section.gpu_memory_utilization,
            "enforce_eager": section.enforce_eager,
            "tensor_parallel_size": section.tensor_parallel_size,
            "enable_prefix_caching": section.enable_prefix_caching,
            "limit_mm_per_prompt": {"image": 1, "video": 1},
            "trust_remote_code": False,
            "use_tqdm_on_load": False,
        }
        if section.kv_cache_bytes is not None:
            arguments["kv_cache_memory_bytes"] = section.kv_cache_bytes
        if self.device == "cpu":
            arguments |= {
                "dtype": "float32" if section.dtype == "auto" else section.dtype,
                "enforce_eager": True,
                # a seeded request whose prompt is cut into chunks fails: vLLM rewinds its generator
                # after each chunk, and torch's CPU generator has no offset to rewind
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(section.max_num_batched_tokens, self.max_model_len),
                "kv_cache_memory_bytes": section.kv_cache_bytes
                or max(CPU_KV_CACHE_BYTES, _cache_bytes(text_config, self.max_model_len)),
                "skip_mm_profiling": True,  # else 16 images of the largest size are encoded first
            }
        return arguments | section.vllm

    def _params(self, sampling: Sampling, seed: int | None) -> Any:
        from vllm import SamplingParams

        greedy = sampling.temperature == 0
        return SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=-1 if greedy else sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=None if greedy else seed,
            logit_bias={token: float("-inf") for token in self._placeholders},
        )

    def _prompt(self, request: Request) -> dict[str, Any]:
        media: Literal["image", "video"] = "image" if request.image is not None else "video"
        content = [{"type": media}, {"type": "text", "text": self._defused(request.text)}]
        text = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        self._check_length(text, self._media_tokens(request))
        prompt: dict[str, Any] = {"prompt": text}
        if request.image is not None:
            from PIL import Image

            prompt["multi_modal_data"] = {"image": Image.fromarray(request.image)}
        else:
            assert request.video is not None
            prompt["multi_modal_data"] = {"video": request.video}
            prompt["mm_processor_kwargs"] = {
                "video_metadata": [{"fps": request.fps, "total_num_frames": len(request.video)}],
                "do_sample_frames": False,
            }
        return prompt

    def _defused(self, text: str) -> str:
        """`text` with the tokenizer's control tokens broken up, so that none is read as one."""
        for token in self._special:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def _media_tokens(self, request: Request) -> int:
        """Tokens of the image or video; InputError when the processor would resize it."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        if request.image is not None:
            processor, shape, steps = self._processor.image_processor, request.image.shape, 1
        else:
            assert request.video is not None
            processor, shape = self._processor.video_processor, request.video.shape[1:]
            steps = -(-len(request.video) // processor.temporal_patch_size)
        height, width = shape[:2]
        cell = processor.patch_size * processor.merge_size
        low, high = processor.size["shortest_edge"], processor.size["longest_edge"]
        resized = smart_resize(height, width, cell, low, high)
        if resized != (height, width):
            raise InputError(
                f"the model's processor would resize {height} x {width} pixels to "
                f"{resized[0]} x {resized[1]}; choose a canvas that it leaves alone",
                file=self.model,
                key="canvas",
            )
        return steps * (height // cell) * (width // cell)

    def _check_length(self, text: str, media_tokens: int) -> None:
        length = len(self._processor.tokenizer(text)["input_ids"]) + media_tokens
        if length >= self.max_model_len:
            raise InputError(
                f"a prompt has {length} tokens, {media_tokens} of them image or video, and the "
                f"engine takes {self.max_model_len}; raise it, or set predict.max_frames",
                key="engine.max_model_len",
            )


def _cache_bytes(text_config: Any, tokens: int) -> int:
    """Bytes of float32 keys and values of one sequence of `tokens`, and a tenth more for blocks."""
    heads = text_config.num_key_value_heads
    head_dim = text_config.hidden_size // text_config.num_attention_heads
    return int(1.1 * 2 * 4 * text_config.num_hidden_layers * heads * head_dim * tokens)


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
