"""Inference at real sizes with random weights on one GPU: rollouts, the pipeline, SAM2, J and F.

    python benchmarks/bench_gpu_infer.py [--parts rollout,pipeline,sam2,jf] [--json FILE]
                                         [--seconds S] [--out DIR] [--shape 3b] [--device cuda]

- rollout: 16 prompts of 900 vision tokens, 8 responses of 300 tokens each, in one vLLM engine.
- pipeline: VDG, KFG, AKS and KTG on videos of 32 and 128 frames, 1 and 8 queries at once (one video
  each), with and without the prefix cache. The engine generates every response with a fixed length,
  but the pipeline reads scripted answers: it refuses the first two keyframes of each query. Counts
  how often the vision tower encodes a video.
- sam2: SAM2.1-large in fp32, bf16, and bf16 with a compiled image encoder; 1, 4 and 16 objects.
- jf: J and F on one core and on all cores.

Each figure is printed as a JSON line and written to `--json` as soon as it is known. For a trial on
a CPU use `--shape tiny --device cpu`.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from gpu.random_model import SHAPES, write_model
from gpu.record import BenchRecord, GpuMemory
from vision_counter import EXTENSION, vision_passes

from rcot_rl.inference.policy import PolicyResponse

PARTS = ("rollout", "pipeline", "sam2", "jf")
REFUSALS = 2
LENGTHS = {"vdg": 256, "kfg": 128, "aks": 200, "ktg": 300}
"""Tokens per response; all differ, since the scripted policy recognizes a task by its limit."""


NUMBERS = itertools.count()


@dataclass
class ScriptedPolicy:
    """One query's policy: generates with the real engine, but fixes the pipeline's path."""

    engine: Any
    read_prefix: bool
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    async def generate(self, request: Any, sampling: Any, started: Any = None) -> list[Any]:
        """Generate `sampling.max_tokens` tokens, and return a scripted answer."""
        task = next(t for t, n in LENGTHS.items() if n == sampling.max_tokens)
        self.calls[task] = self.calls.get(task, 0) + 1
        turn, before = self.calls[task], time.perf_counter()
        count = await generate_exactly(
            self.engine, request, sampling, read_prefix=self.read_prefix, started=started
        )
        self.seconds[task] = self.seconds.get(task, 0.0) + time.perf_counter() - before
        self.tokens[task] = self.tokens.get(task, 0) + count
        answer = {
            "vdg": "a clip",
            "kfg": str(turn),
            "aks": "B" if turn <= REFUSALS else "A",
            "ktg": '[{"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]}]',
        }[task]
        return [PolicyResponse(f"<think>scripted</think><answer>{answer}</answer>")]

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return self.engine.count_tokens(text)

    def most_frames(self, side: int, text_tokens: int) -> int:
        """Return the number of frames that fit beside a text."""
        return self.engine.most_frames(side, text_tokens)


async def generate_exactly(
    engine: Any,
    request: Any,
    sampling: Any,
    *,
    read_prefix: bool = True,
    started: asyncio.Event | None = None,
) -> int:
    """Generate responses of exactly `sampling.max_tokens` tokens; return the number of tokens."""
    params = engine._params(sampling, request.seed, stream=started is not None)
    params.ignore_eos = True
    params.skip_reading_prefix_cache = not read_prefix
    prompt = await asyncio.to_thread(engine._prompt, request)
    last: Any = None
    async for output in engine._llm.generate(prompt, params, f"bench-{next(NUMBERS)}"):
        last = output
        if started is not None:
            started.set()
    return sum(len(choice.token_ids) for choice in last.outputs)


async def rollout(engine: Any, record: BenchRecord, side: int) -> None:
    """Measure the rollouts of a GRPO step."""
    from rcot_rl.inference.policy import PolicyRequest, Sampling

    rng = np.random.default_rng(0)
    text = "Find the object that moves last and give its box. " * 20
    for label in ("first", "second"):
        images = rng.integers(0, 255, (16, side, side, 3), dtype=np.uint8)
        requests = [PolicyRequest(text, image=image, seed=i) for i, image in enumerate(images)]
        started = time.perf_counter()
        sampling = Sampling(300, n=8, temperature=1.0)
        tokens = sum(
            await asyncio.gather(*(generate_exactly(engine, r, sampling) for r in requests))
        )
        seconds = time.perf_counter() - started
        row = {"part": "rollout", "run": label, "seconds": seconds, "tokens": tokens}
        record.add(row | {"tokens_per_s": tokens / seconds})


async def pipeline(engine: Any, record: BenchRecord, canvas: Any, lengths: tuple[int, ...]) -> None:
    """Measure both stages of reasoning, on new videos each time."""
    from rcot_rl.inference.pipeline import VideoReasoner
    from rcot_rl.inference.query_trace import VideoClip
    from rcot_rl.protocol.prompts import load_prompts
    from rcot_rl.recipe.inference_section import PredictSection

    tokens_of = {f"{task}_tokens": n for task, n in LENGTHS.items()}
    settings = PredictSection.model_validate({"rounds": 5, **tokens_of}).reasoning()
    prompts = load_prompts("qwen")
    rng = np.random.default_rng(1)
    for n_frames in lengths:
        for n_queries in (1, 8):
            for read_prefix in (True, False):
                if record.left() < 30:
                    return
                videos = rng.integers(0, 255, (n_queries, n_frames, 64, 64, 3), dtype=np.uint8)
                policies = [ScriptedPolicy(engine, read_prefix) for _ in videos]
                reasoners = [
                    VideoReasoner(
                        VideoClip(f"{rng.random()}", n_frames, video.__getitem__),
                        policy,
                        prompts,
                        canvas,
                    )
                    for video, policy in zip(videos, policies, strict=True)
                ]
                before = await vision_passes(engine)
                started = time.perf_counter()
                traces = await asyncio.gather(
                    *(reasoner.trace("the last one", settings) for reasoner in reasoners)
                )
                seconds = time.perf_counter() - started
                after = await vision_passes(engine)
                assert all(t.rounds == REFUSALS + 1 and t.boxes_source for t in traces)
                tokens = sum(sum(policy.tokens.values()) for policy in policies)
                record.add(
                    {
                        "part": "pipeline",
                        "frames": n_frames,
                        "queries": n_queries,
                        "prefix_cache": read_prefix,
                        "seconds": seconds,
                        "seconds_per_query": seconds / n_queries,
                        "tokens": tokens,
                        "tokens_per_s": tokens / seconds,
                        "videos_encoded": after["video"] - before["video"],
                        "images_encoded": after["image"] - before["image"],
                        "images_shown": n_queries * (REFUSALS + 2),
                        "videos": n_queries,
                    }
                )


def sam2(record: BenchRecord, device: str, tiny: bool) -> None:
    """Measure SAM2 with the product's segmenter."""
    import torch
    from gpu.sam2_large import build, propagate

    size, n_frames = ((128, 128), 6) if tiny else ((720, 1280), 24)
    frames = np.random.default_rng(2).integers(0, 255, (n_frames, *size, 3), dtype=np.uint8)
    for dtype, compiled in (("bfloat16", False), ("float32", False), ("bfloat16", True)):
        segmenter = build(device, dtype, tiny=tiny)
        if compiled:
            # not the neck: if compiled, its position encoding becomes float32
            encoder = segmenter.model.vision_encoder
            encoder.backbone = torch.compile(encoder.backbone)
        parameters = sum(p.numel() for p in segmenter.model.parameters())
        propagate(segmenter, frames[:4], 1)  # loads or compiles kernels
        for objects in (1, 4, 16):
            if record.left() < 15:
                return
            row = propagate(segmenter, frames, objects)
            case = {"part": "sam2", "dtype": dtype, "compiled": compiled, "objects": objects}
            facts = {"frames": n_frames, "size": list(size), "parameters": parameters}
            record.add(case | row | facts)
        del segmenter
        if device == "cuda":
            torch.cuda.empty_cache()


def jf(record: BenchRecord, tiny: bool) -> None:
    """Compare J and F of clips at 480 x 854 with the DAVIS 2017 reference."""
    from bench_jf import reference_jf

    frames = 16 if tiny else 240
    cores = os.cpu_count() or 1
    score(4)
    started = time.perf_counter()
    score(frames)
    single = frames / (time.perf_counter() - started)
    with ProcessPoolExecutor() as pool:
        list(pool.map(score, [4] * 2 * cores))
        started = time.perf_counter()
        list(pool.map(score, [frames] * 4 * cores))
        parallel = 4 * cores * frames / (time.perf_counter() - started)
    gt, pred = masks()
    started = time.perf_counter()
    reference_jf(gt, pred)
    reference = len(gt) / (time.perf_counter() - started)
    row = {"part": "jf", "masks_per_s_one_core": single, "masks_per_s_all_cores": parallel}
    row |= {"reference_masks_per_s": reference, "ratio_to_reference": single / reference}
    record.add(row | {"cores": cores})


@functools.cache
def masks() -> tuple[np.ndarray, np.ndarray]:
    """Return ground truth and prediction, bool [4, 480, 854]: a disk of 13 % of the image."""
    ys, xs = np.mgrid[:480, :854]
    gt = np.stack([np.hypot(ys - 240 - t, xs - 300 - 9 * t) < 130 for t in range(4)])
    return gt, np.roll(gt, (3, -5), axis=(1, 2))


def score(frames: int) -> None:
    """Score `frames` frames, four at a time."""
    from rcot_rl.evaluation.jf import jf_video

    gt, pred = masks()
    for _ in range(frames // len(gt)):
        jf_video(gt, pred)


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--shape", default="3b", choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, help="end after this many seconds")
    parser.add_argument("--out", type=Path, help="folder of the model; default: a temporary one")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    record = BenchRecord(
        options.json, options.seconds, shape=options.shape, parts=parts, lengths=LENGTHS
    )
    tiny = options.shape == "tiny"
    with GpuMemory() as memory:
        if "sam2" in parts:
            sam2(record, options.device, tiny)
        if "jf" in parts:
            jf(record, tiny)
        if {"rollout", "pipeline"} & set(parts):
            with tempfile.TemporaryDirectory(prefix="rcot-gpu-") as temporary:
                with_engine(record, options, (options.out or Path(temporary)) / "model", parts)
    record.write(memory_gib_gpu_used_max=memory.peak_mib / 1024)


def with_engine(record: BenchRecord, options: Any, model: Path, parts: list[str]) -> None:
    """Start one engine for the parts that need it."""
    from rcot_rl.inference.engine import PolicyEngine
    from rcot_rl.recipe.inference_section import EngineSection
    from rcot_rl.recipe.schema import CanvasSection

    tiny = options.shape == "tiny"
    write_model(model.resolve(), options.shape, options.device)
    canvas = CanvasSection(image=112, video=112) if tiny else CanvasSection()
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    section = EngineSection(
        enforce_eager=options.eager,
        max_num_seqs=128,
        gpu_memory_utilization=0.4,
        vllm={
            "worker_extension_cls": EXTENSION,
            **({} if options.eager or tiny else {"compilation_config": graphs}),
        },
    )

    async def run() -> None:
        started = time.perf_counter()
        with PolicyEngine(model.resolve(), section, device=options.device) as engine:
            record.add({"part": "engine", "start_s": time.perf_counter() - started})
            if "rollout" in parts:
                await rollout(engine, record, canvas.image)
            if "pipeline" in parts:
                await pipeline(engine, record, canvas, (8, 16) if tiny else (32, 128))

    asyncio.run(run())


if __name__ == "__main__":
    main()
