"""The policy in vLLM's asynchronous engine: requests in, responses out, weights swapped in place.

One engine serves a whole prediction run and several checkpoints of one network in turn, because
starting it takes longer than all the work of a small model. vLLM runs the model in a process of its
own, which batches all requests that are in progress.

Not implemented: LoRA adapters, several images or videos in one prompt.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import check_model, check_same_model
from rcot_rl.inference.policy import PolicyRequest, PolicyResponse, Sampling
from rcot_rl.inference.prompting import Prompter, engine_arguments, video_arguments
from rcot_rl.protocol.parser import ANSWER, parse_response
from rcot_rl.recipe.inference_section import EngineSection

logger = logging.getLogger(__name__)

_ENVIRONMENT: dict[str, str | None] = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for results
    "TOKENIZERS_PARALLELISM": "false",
}
_CPU_ENVIRONMENT: dict[str, str | None] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model runs in the engine's process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines share the cores
    "VLLM_CPU_KVCACHE_SPACE": None,  # whole GiB only, and overrides kv_cache_memory_bytes
}

_LEFT_BEHIND = ("LD_PRELOAD", "LOCAL_WORLD_SIZE")
"""Variables that vLLM sets in this process for workers that it does not start, besides VLLM_*."""


class PolicyEngine:
    """A Qwen2.5-VL checkpoint in a vLLM engine; leaving the context ends its processes."""

    def __init__(
        self,
        model: Path,
        section: EngineSection,
        *,
        device: Literal["cpu", "cuda"] = "cuda",
        seed: int = 0,
    ) -> None:
        """Start the engine on a checkpoint folder.

        Raises:
            InputError: The folder is not a complete checkpoint (checked before vLLM is imported),
                or vLLM refuses the settings.
        """
        check_model(model)
        self.model = model
        self.section = section
        self.device = device
        self._environment: dict[str, str] | None = None
        self._llm: Any = None
        self._ids = itertools.count()
        self._start(seed)

    async def generate(
        self, request: PolicyRequest, sampling: Sampling, started: asyncio.Event | None = None
    ) -> list[PolicyResponse]:
        """Return `sampling.n` responses without special tokens; see `Policy`. Raises InputError."""
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        prompt = await asyncio.to_thread(self._prompt, request)
        params = self._params(sampling, request.seed, stream=started is not None)
        output: Any = None
        async for latest in self._llm.generate(prompt, params, f"rcot-{next(self._ids)}"):
            output = latest
            if started is not None:
                started.set()
        seconds = _seconds(output.metrics)
        return [
            PolicyResponse(
                choice.text,
                tokens=len(choice.token_ids),
                prompt_tokens=len(output.prompt_token_ids),
                cached_tokens=output.num_cached_tokens or 0,
                seconds=seconds,
                option_probabilities=self._option_probabilities(choice, sampling.options),
            )
            for choice in output.outputs
        ]

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a response."""
        return int(self._prompter.count(text))

    def most_frames(self, side: int, text_tokens: int) -> int:
        """Return the number of frames that fit beside `text_tokens`; see `Policy`."""
        return self._prompter.most_frames((side, side), text_tokens)

    def video_tokens(self, n_frames: int, side: int) -> int:
        """Return the number of tokens of a video of square frames, as far as it can be shown."""
        shown = min(n_frames, self.most_frames(side, 0))
        return self._prompter.media_tokens("video", (side, side), shown)

    @property
    def cache_tokens(self) -> int:
        """Number of tokens that the KV cache holds."""
        cache = self._llm.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    async def load_checkpoint(self, path: Path) -> None:
        """Replace the weights in place by those of another checkpoint of the same network.

        All caches of values computed from the old weights are cleared.

        Raises:
            InputError: The folder is not a complete checkpoint, or has another network, tokenizer
                or set of tensors. The engine keeps its weights.
        """
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        check_model(path)
        check_same_model(self.model, path)
        try:
            await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        except BaseException:
            self.close()  # partially loaded weights must not be used
            raise
        if not await self._llm.reset_prefix_cache():
            self.close()
            raise RuntimeError("vLLM did not empty its prefix cache after a weight swap")
        await self._llm.reset_mm_cache()
        await self._llm.reset_encoder_cache()
        self.model = path
        logger.info("policy engine: loaded the weights of %s", path)

    def close(self) -> None:
        """Stop the engine and free its memory. Does nothing if it is closed."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()
            del llm
            gc.collect()
        if self._environment is not None:
            changed = {*_ENVIRONMENT, *_CPU_ENVIRONMENT, *_LEFT_BEHIND}
            for name in {*os.environ, *self._environment}:
                if name in changed or name.startswith("VLLM_"):
                    _set_variable(name, self._environment.get(name))
            self._environment = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self, seed: int) -> None:
        variables = _ENVIRONMENT | (_CPU_ENVIRONMENT if self.device == "cpu" else {})
        self._environment = dict(os.environ)
        for name, value in variables.items():
            _set_variable(name, value)
        self._prompter = Prompter(self.model, self.section.max_model_len)
        self.max_model_len = self._prompter.max_model_len
        from pydantic import ValidationError
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            arguments = engine_arguments(self.section, self.device, self._prompter)
            known: dict[str, Any] = {
                "model": str(self.model),
                "seed": seed,
                "use_tqdm_on_load": False,
            }
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**(known | arguments)))
        except (ValueError, ValidationError, TypeError) as error:
            self.close()
            reason = " ".join(str(error).split())
            raise InputError(
                f"vLLM refused the engine's settings: {reason}", key="engine"
            ) from error
        except BaseException:
            self.close()
            raise
        logger.info("policy engine: model %s on %s, %s", self.model, self.device, arguments)

    def _params(self, sampling: Sampling, seed: int | None, *, stream: bool = False) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(**self._prompter.params(sampling, seed))
        if not stream:
            params.output_kind = RequestOutputKind.FINAL_ONLY
        return params

    def _option_probabilities(self, choice: Any, options: Sequence[str]) -> dict[str, float] | None:
        """Return the probability of each option at the first token of a response's answer."""
        if not options or parse_response(choice.text).answer is None:
            return None
        start = choice.text.index(ANSWER) + len(ANSWER)
        start += len(choice.text[start:]) - len(choice.text[start:].lstrip())
        ids, position = self._prompter.option_ids(options), 0
        for token, alternatives in zip(choice.token_ids, choice.logprobs, strict=True):
            if position == start:
                chances = {o: alternatives[i].logprob for o, i in zip(options, ids, strict=True)}
                return {option: math.exp(chance) for option, chance in chances.items()}
            position += len(alternatives[token].decoded_token or "")
        return None

    def _prompt(self, request: PolicyRequest) -> dict[str, Any]:
        if request.image is not None:
            from PIL import Image

            text = self._prompter.text(request.text, "image", request.image.shape[:2])
            prompt: dict[str, Any] = {
                "prompt": text,
                "multi_modal_data": {"image": Image.fromarray(request.image)},
            }
        else:
            assert request.video is not None
            n_frames, size = len(request.video), request.video.shape[1:3]
            prompt = {
                "prompt": self._prompter.text(request.text, "video", size, n_frames),
                "multi_modal_data": {"video": request.video},
                "mm_processor_kwargs": video_arguments(n_frames, request.fps),
            }
        if request.media_key is not None:
            medium = "image" if request.image is not None else "video"
            prompt["multi_modal_uuids"] = {medium: [request.media_key]}
        return prompt


def _seconds(metrics: Any) -> float:
    """Return the seconds from a request's first scheduling to its last token."""
    return max(0.0, metrics.last_token_ts - metrics.scheduled_ts) if metrics else 0.0


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
