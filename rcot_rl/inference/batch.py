"""Batch requests through vLLM engines on Ray Data, for descriptions and traces of whole corpora.

Ray Data's LLM processor runs the engines as actors of the cluster that the driver is connected to.
Requests are sent as prompts and paths of frames; the frames are read and resized by the workers, so
the driver never holds an image. Answers arrive in any order, each as soon as its block is done.
Nothing is cached here: `data_pipelines.traces.response_cache` keeps the answers.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcot_rl.inference.policy import Sampling
from rcot_rl.inference.prompting import Media, Prompter, engine_arguments, video_arguments
from rcot_rl.recipe.inference_section import EngineSection

logger = logging.getLogger(__name__)

UNREADABLE = "unreadable"
"""Fault of an answer if none of its frames could be read."""


@dataclass(frozen=True)
class Ask:
    """One request: a user turn about frames on disk, which the worker's host must also see."""

    key: str
    text: str
    frames: tuple[str, ...]
    media: Media
    canvas: int
    """Side of the square that frames are resized to, in pixels."""
    seed: int
    fps: float = 2.0
    """Frames per second, if `media` is a video."""


@dataclass(frozen=True)
class Answer:
    """One response."""

    key: str
    text: str
    tokens: int
    """Number of generated tokens."""
    fault: str = ""
    """`UNREADABLE`, or empty."""


class BatchEngine:
    """vLLM engines behind Ray Data. Needs an initialised Ray; keeps nothing between calls."""

    def __init__(
        self,
        model: Path,
        section: EngineSection,
        device: str,
        *,
        engines: int = 1,
        batch: int = 32,
        seed: int = 0,
    ) -> None:
        """Read the model's processor; engines start with the first request.

        Args:
            batch: Requests per block.
        """
        self.prompter = Prompter(model, section.max_model_len)
        self.model, self.section, self.device = model, section, device
        self.engines, self.batch, self.seed = engines, batch, seed
        logger.info(
            "batch engine: model %s, %d engines on %s, %d requests per block, max_model_len %d",
            model,
            engines,
            device,
            batch,
            self.prompter.max_model_len,
        )

    def answers(self, asks: Sequence[Ask], sampling: Sampling) -> Iterator[Answer]:
        """Yield an answer to each request, in any order. Raises InputError."""
        import ray

        if not asks:
            return
        rows = [self._row(ask, sampling) for ask in asks]
        blocks = max(1, math.ceil(len(rows) / self.batch))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        dataset = ray.data.from_items(rows, override_num_blocks=blocks)
        for block in self._processor()(dataset).iter_batches(batch_size=None, prefetch_batches=0):
            for key, text, tokens in zip(block["key"], block["text"], block["tokens"], strict=True):
                fault = UNREADABLE if int(tokens) < 0 else ""
                yield Answer(str(key), "" if fault else str(text), max(int(tokens), 0), fault)

    def _row(self, ask: Ask, sampling: Sampling) -> dict[str, Any]:
        size = (ask.canvas, ask.canvas)
        return {
            "key": ask.key,
            "prompt": self.prompter.text(ask.text, ask.media, size, len(ask.frames)),
            "frames": list(ask.frames),
            "canvas": ask.canvas,
            "media": ask.media,
            "fps": ask.fps,
            # JSON text: Arrow has no type for a mapping by token, nor for an absent seed
            "sampling": json.dumps(self.prompter.params(sampling, ask.seed)),
        }

    def _processor(self) -> Any:
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        arguments = engine_arguments(self.section, self.device, self.prompter)
        arguments |= {"seed": self.seed, "disable_log_stats": True}
        placement = None
        if self.device == "cpu":
            placement = {"bundles": [{"CPU": 1}]}
        config = vLLMEngineProcessorConfig(
            model_source=str(self.model),
            engine_kwargs=arguments,
            concurrency=(self.engines, self.engines),
            batch_size=self.batch,
            max_concurrent_batches=2,
            placement_group_config=placement,
            log_engine_metrics=False,
            prepare_multimodal_stage=False,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
        )
        return build_processor(config, preprocess=prepare, postprocess=finish)


def prepare(row: dict[str, Any]) -> dict[str, Any]:
    """Return the engine stage's input: the row with its frames read and resized to the canvas.

    A frame that does not decode is replaced by the nearest one that does, because the prompt names
    the number of frames. A row without any readable frame is marked unreadable.
    """
    images = _fill_gaps([_frame(path, int(row["canvas"])) for path in row["frames"]])
    sampling = json.loads(row["sampling"])
    sampling["logit_bias"] = {int(k): v for k, v in sampling["logit_bias"].items()}
    out = {"key": row["key"], "readable": bool(images)}
    if not images:
        # the engine stage takes every row: this one generates one token, which is discarded
        images = [_blank(int(row["canvas"]))] * len(row["frames"])
        sampling["max_tokens"] = 1
    media: dict[str, Any]
    if row["media"] == "image":
        from PIL import Image

        media = {"image": Image.fromarray(images[0])}
    else:
        import numpy as np

        media = {"video": np.stack(images)}
        out["mm_processor_kwargs"] = OpaqueDict(video_arguments(len(images), float(row["fps"])))
    out |= {
        "prompt": row["prompt"],
        "multimodal_data": OpaqueDict(media),
        "sampling_params": OpaqueDict(sampling),
    }
    return out


def _fill_gaps(images: list[Any]) -> list[Any]:
    """Replace each None by the nearest image, on a tie by the earlier; empty if all are None."""
    readable = [k for k, image in enumerate(images) if image is not None]
    if not readable:
        return []
    return [images[min(readable, key=lambda k: (abs(k - i), k))] for i in range(len(images))]


def finish(row: dict[str, Any]) -> dict[str, Any]:
    """Return the key, text and token count of an engine's output; -1 tokens: unreadable."""
    tokens = int(row["num_generated_tokens"]) if row["readable"] else -1
    return {"key": row["key"], "text": row["generated_text"], "tokens": tokens}


class OpaqueDict(dict[str, Any]):
    """A mapping that Arrow carries as one object, instead of splitting it into columns."""


def _frame(path: str, canvas: int) -> Any:
    """Return uint8 [canvas, canvas, 3] RGB; None if the file does not decode."""
    import cv2

    from data_pipelines.geometry import to_canvas

    bgr = cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if bgr is None else to_canvas(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), canvas)


def _blank(canvas: int) -> Any:
    import numpy as np

    return np.zeros((canvas, canvas, 3), dtype=np.uint8)
