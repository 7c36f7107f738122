"""Compare the cached agent loop with verl's: seconds of decoding and processing per group of n.

    python benchmarks/bench_agent_loop.py [--n 8] [--groups 6]

Runs verl's single-turn loop and ours on the same prompts in one process. Every image is decoded
from its file's bytes, the processor is the policy's, the rollout engine answers at once. Prints
milliseconds per group at the canvas of the laptop recipe and of the paper, and the ratio of verl's
to ours. Responses of a group overlap, so the processor's seconds can exceed the whole.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"VERL_PLATFORM": "cpu", "RCOT_RL_PLUGIN": "required"}

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import create_continuous_token_builder
from verl.utils.tokenizer import hf_processor

from rcot_rl.inference.model_folder import TINY
from rcot_rl.training import cached_agent_loop


class TimedProcessor:
    """A processor that adds up the seconds it takes."""

    def __init__(self, inner: Any, spent: dict[str, float]) -> None:
        self._inner, self._spent = inner, spent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._inner(*arguments, **options)
        finally:
            self._spent["processor"] += time.perf_counter() - started


class Server:
    """A rollout engine without a model."""

    async def generate(self, prompt_ids: list[int], **_: Any) -> SimpleNamespace:
        """Return three tokens."""
        await asyncio.sleep(0)
        return SimpleNamespace(
            token_ids=[9, 10, 2],
            log_probs=[-0.1] * 3,
            num_preempted=0,
            routed_experts=None,
            extra_fields={},
        )


def paper_limits(folder: Path) -> Path:
    """Copy the tiny policy's processor with the pixel limits of Qwen2.5-VL, for 840 pixels."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}
    path.write_text(json.dumps(config))
    return folder


def measure(model: Path, canvas: int, n: int, groups: int) -> dict[str, dict[str, float]]:
    """Return loop -> seconds per group: decoding, processor and the whole."""
    spent = {"decode": 0.0, "processor": 0.0}
    tokenizer = AutoTokenizer.from_pretrained(model)
    processor = TimedProcessor(hf_processor(model), spent)
    builder = create_continuous_token_builder(
        tokenizer,
        hf_model_type="qwen2_5_vl",
        chat_template_kwargs={},
        mm_processor_kwargs={},
        processor=processor,
    )
    builder.processor = processor
    pixels = np.random.default_rng(0).integers(0, 255, (canvas, canvas, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    content = [{"type": "image"}, {"type": "text", "text": "Query: a circle. Give boxes."}]
    messages = [{"role": "user", "content": content}]

    class Decoder:
        @staticmethod
        async def process_multi_modal_info(messages: Any, **_: Any) -> tuple[Any, None, None]:
            started = time.perf_counter()
            image = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
            spent["decode"] += time.perf_counter() - started
            await asyncio.sleep(0)
            return [image], None, None

    async def response(worker: Any, loop_class: Any) -> None:
        loop = object.__new__(loop_class)
        loop.__dict__.update(
            processor=processor,
            tokenizer=tokenizer,
            dataset_cls=Decoder,
            data_config={},
            mm_processor_kwargs={},
            continuous_token_builder=builder,
            server_manager=Server(),
            rollout_config=SimpleNamespace(prompt_length=3000, response_length=50),
            prompt_length=3000,
            response_length=50,
            loop=asyncio.get_running_loop(),
        )
        output = await loop.run({}, raw_prompt=messages)
        ids = torch.tensor(output.prompt_ids + output.response_ids)
        for _ in range(2):  # before the reward call, and before TransferQueue
            worker._compute_multi_modal_inputs(output, ids)

    async def group(self: Any, prompt: Any, loop_class: Any) -> None:
        tasks = [asyncio.create_task(response(self, loop_class)) for _ in range(n)]
        await asyncio.gather(*tasks)

    # verl's worker needs a live engine and queue; only the loop is timed here
    cached_agent_loop._VerlWorker._run_prompt = group
    results: dict[str, dict[str, float]] = {}
    for name, worker_class, loop_class in (
        ("verl", cached_agent_loop._VerlWorker, cached_agent_loop.SingleTurnAgentLoop),
        ("cached", cached_agent_loop.CachedAgentLoopWorkerTQ, cached_agent_loop.CachedSingleTurn),
    ):
        worker = object.__new__(worker_class)
        worker.processor, worker.tokenizer, worker.mm_processor_kwargs = processor, tokenizer, {}
        for index in range(groups + 1):
            if index == 1:  # the first group warms up
                spent.update(decode=0.0, processor=0.0)
                started = time.perf_counter()
            asyncio.run(worker._run_prompt({}, loop_class))
        whole = time.perf_counter() - started
        results[name] = {k: v / groups for k, v in {**spent, "whole": whole}.items()}
    return results


def main() -> None:
    """Print one line per canvas and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--groups", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="bench-loop-"))
    try:
        large = paper_limits(folder / "model")
        for canvas, model in ((112, TINY), (840, large)):
            seconds = measure(model, canvas, options.n, options.groups)
            for part in ("decode", "processor", "whole"):
                verl, cached = seconds["verl"][part], seconds["cached"][part]
                print(
                    f"canvas {canvas:4d}, n = {options.n}, {part:<9} "
                    f"verl {1e3 * verl:9.2f} ms  cached {1e3 * cached:8.2f} ms  "
                    f"ratio {verl / cached:6.2f}"
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
