"""The policy in vLLM's offline engine: requests in, texts out, weights swapped in place.

One engine serves a whole prediction run and several checkpoints of one network in turn, because
starting it takes longer than all the work of a small model. On a CPU the engine runs in this
process; on a GPU it is vLLM's usual one.

Not implemented: asynchronous serving, LoRA adapters, several images or videos in one prompt.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import check_model, check_same_model
from rcot_rl.inference.policy import PolicyRequest, Sampling
from rcot_rl.inference.prompting import Prompter, engine_arguments, video_arguments
from rcot_rl.recipe.inference_section import EngineSection

logger = logging.getLogger(__name__)

_ENVIRONMENT: dict[str, str | None] = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is for results
    "TOKENIZERS_PARALLELISM": "false",
}
_CPU_ENVIRONMENT: dict[str, str | None] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # a binding would outlive the engine in this process
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
        self._start(seed)

    def generate(self, requests: Sequence[PolicyRequest], sampling: Sampling) -> list[list[str]]:
        """Return `sampling.n` responses per request, without special tokens. Raises InputError."""
        if not requests:
            return []
        if self._llm is None:
            raise RuntimeError("the engine is closed")
        prompts = [self._prompt(request) for request in requests]
        params = [self._params(sampling, request.seed) for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [[choice.text for choice in output.outputs] for output in outputs]

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a response."""
        return int(self._prompter.count(text))

    def load_checkpoint(self, path: Path) -> None:
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
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        except BaseException:
            self.close()  # partially loaded weights must not be used
            raise
        if not self._llm.reset_prefix_cache():
            self.close()
            raise RuntimeError("vLLM did not empty its prefix cache after a weight swap")
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        self.model = path
        logger.info("policy engine: loaded the weights of %s", path)

    def close(self) -> None:
        """Stop the engine and free its memory. Does nothing if it is closed."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            if self.device == "cpu":
                from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

                cleanup_dist_env_and_memory()
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
        from vllm import LLM

        try:
            arguments = engine_arguments(self.section, self.device, self._prompter)
            self._llm = LLM(str(self.model), seed=seed, **({"use_tqdm_on_load": False} | arguments))
        except ValueError as error:
            self.close()
            reason = " ".join(str(error).split())
            raise InputError(
                f"vLLM refused the engine's settings: {reason}", key="engine"
            ) from error
        except BaseException:
            self.close()
            raise
        logger.info("policy engine: model %s on %s, %s", self.model, self.device, arguments)

    def _params(self, sampling: Sampling, seed: int | None) -> Any:
        from vllm import SamplingParams

        return SamplingParams(**self._prompter.params(sampling, seed))

    def _prompt(self, request: PolicyRequest) -> dict[str, Any]:
        if request.image is not None:
            from PIL import Image

            text = self._prompter.text(request.text, "image", request.image.shape[:2])
            return {
                "prompt": text,
                "multi_modal_data": {"image": Image.fromarray(request.image)},
            }
        assert request.video is not None
        n_frames, size = len(request.video), request.video.shape[1:3]
        return {
            "prompt": self._prompter.text(request.text, "video", size, n_frames),
            "multi_modal_data": {"video": request.video},
            "mm_processor_kwargs": video_arguments(n_frames, request.fps),
        }


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
