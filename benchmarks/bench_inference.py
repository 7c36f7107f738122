"""Measure the inference pipeline on this host's CPU with the shipped tiny models.

    python benchmarks/bench_inference.py [--part vision aks pool masks] [--videos 8] [--queries 3]

Each part prints a ratio to a baseline in the same run:

- vision: how often a video is encoded if every judgement refuses (λ = 5). Baseline: prompts without
  a common start, sent without waiting for the first one.
- aks: extra seconds with AKS (λ = 5), if the first judgement accepts, for short and long videos.
  Baseline: an engine without prefix cache. SAM2 is not included.
- pool: seconds to predict a corpus with one and two engine processes, less those for two videos,
  so that the start is left out. Baseline: one process that reasons about 16 queries, then segments
  them, in turn.
- masks: CPU milliseconds per prediction of the shipped policy in seven variants: answers of the
  policy, masks, and scores. Baselines: masks without a store, so that each prediction is a pass of
  SAM2; and each variant scored alone. Masks and scores must be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from vision_counter import EXTENSION, vision_passes

from data_pipelines.toy.layouts import write_corpus
from rcot_rl.inference.engine import PolicyEngine
from rcot_rl.inference.model_folder import TINY
from rcot_rl.inference.pipeline import VideoReasoner
from rcot_rl.inference.policy import PolicyRequest, PolicyResponse, Sampling
from rcot_rl.inference.query_trace import VideoClip
from rcot_rl.protocol.prompts import Prompts, load_prompts
from rcot_rl.recipe.inference_section import EngineSection, PredictSection
from rcot_rl.recipe.loader import dump_recipe, load_recipe
from rcot_rl.recipe.schema import CanvasSection

CANVAS = CanvasSection(image=112, video=112)
LENGTHS = {"vdg_tokens": 48, "kfg_tokens": 8, "aks_tokens": 48, "ktg_tokens": 48}


class Verdicts:
    """An engine whose judgements are replaced by one verdict; everything is still generated."""

    def __init__(self, engine: PolicyEngine, verdict: str) -> None:
        self.engine, self.verdict = engine, verdict
        self.count_tokens, self.most_frames = engine.count_tokens, engine.most_frames

    async def generate(
        self, request: PolicyRequest, sampling: Sampling, started: asyncio.Event | None = None
    ) -> list[PolicyResponse]:
        responses = await self.engine.generate(request, sampling, started)
        if not sampling.options:
            return responses
        text = f"<think>so</think><answer>{self.verdict}</answer>"
        return [replace(response, text=text) for response in responses]


class Impatient(VideoReasoner):
    """The baseline: all prompts about a video are sent at once."""

    async def _after_first(self, shared: str, policy: Any, request: Any, sampling: Any) -> Any:
        return (await policy.generate(request, sampling))[0]


def prompts(*, common_start: bool) -> Prompts:
    """Return the tiny policy's prompts, with or without a start longer than a cache block."""
    templates = dict(load_prompts("compact").templates)
    if common_start:
        templates["video"] = " ".join(["first red circle, then blue square."] * 6)
    return Prompts("bench", templates)


def clips(count: int, frames: int, seed: int) -> Iterator[VideoClip]:
    """Yield clips of noise, so that no two are equal."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        images = rng.integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8)
        yield VideoClip(f"{seed}-{number}", frames, images.__getitem__)


async def ask(
    kind: type[VideoReasoner],
    policy: Any,
    prompt_set: Prompts,
    section: PredictSection,
    videos: list[VideoClip],
    queries: int,
) -> float:
    """Answer all queries together, and return the seconds."""
    started = time.perf_counter()
    reasoners = [kind(clip, policy, prompt_set, CANVAS) for clip in videos]
    await asyncio.gather(
        *(
            reasoner.trace(f"circle {number}", section.reasoning())
            for reasoner in reasoners
            for number in range(queries)
        )
    )
    return time.perf_counter() - started


def engine(most_tokens: int = 1024, **changes: Any) -> PolicyEngine:
    """Return an engine with a small encoder cache, as a large model on a GPU has."""
    section = EngineSection(
        max_model_len=most_tokens,
        max_num_seqs=64,
        max_num_batched_tokens=most_tokens,
        kv_cache_bytes=128 << 20,
        vllm={"worker_extension_cls": EXTENSION},
        **changes,
    )
    return PolicyEngine(TINY, section, device="cpu")


async def vision(n_videos: int, n_queries: int) -> dict[str, Any]:
    """Count vision passes per video when every judgement refuses."""
    section = PredictSection(rounds=5, **LENGTHS)
    passes = {}
    with engine() as policy:
        for name, kind, start in (("ours", VideoReasoner, True), ("baseline", Impatient, False)):
            before = await vision_passes(policy)
            videos = list(clips(n_videos, 48, seed=len(name)))
            arguments = Verdicts(policy, "B"), prompts(common_start=start), section
            await ask(kind, *arguments, videos, n_queries)
            after = await vision_passes(policy)
            passes[name] = (after["video"] - before["video"]) / n_videos
    return {"part": "vision", "videos": n_videos, "queries": n_queries, "passes_per_video": passes}


async def aks(n_videos: int, n_queries: int, frames: int) -> dict[str, Any]:
    """Compare seconds with AKS and without, if the first judgement accepts."""
    extra: dict[str, float] = {}
    for name, cached in (("prefix cache", True), ("baseline", False)):
        with engine(4096, enable_prefix_caching=cached) as policy:
            seconds: dict[int, list[float]] = {0: [], 5: []}
            for repeat in range(3):
                for rounds in (0, 5):
                    videos = list(clips(n_videos, frames, seed=100 * repeat + rounds + 7))
                    section = PredictSection(rounds=rounds, **LENGTHS)
                    arguments = Verdicts(policy, "A"), prompts(common_start=True), section
                    taken = await ask(VideoReasoner, *arguments, videos, n_queries)
                    if repeat:  # the first one warms up
                        seconds[rounds].append(taken)
            extra[name] = min(seconds[5]) / min(seconds[0]) - 1
    return {"part": "aks", "frames": frames, "queries": n_queries, "extra_time": extra}


def pool(n_videos: int) -> dict[str, Any]:
    """Predict a corpus with one and two engines, and by the loop in one process."""
    from rcot_rl.inference.ray_session import LOGICAL_CPUS, ray_session

    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_corpus(root / "mevis", "mevis", "valid_u", n_videos, 1, "lattice")
        seconds["baseline"] = asyncio.run(_loop(root))
        for engines in (1, 2):
            recipe = load_recipe("laptop", [f"predict.engines={engines}", "wandb.mode=disabled"])
            file = root / f"recipe-{engines}.yaml"
            file.write_text(dump_recipe(recipe), encoding="utf-8")
            with ray_session(recipe, LOGICAL_CPUS):
                start = _pool_seconds(root, recipe, file, 2)
            with ray_session(recipe, LOGICAL_CPUS):
                whole = _pool_seconds(root, recipe, file, n_videos)
            seconds[f"{engines} engines"] = whole - start
    return {"part": "pool", "videos": n_videos, "seconds": seconds}


VARIANTS: dict[str, dict[str, Any]] = {
    "rounds-0": {"rounds": 0},
    "rounds-2": {"rounds": 2},
    "rounds-10": {"rounds": 10},
    "no-vdg": {"vdg": False},
    "no-kfg": {"kfg": False},
    "light": {"reevaluate_frames": 4},
}
"""Changes of the laptop recipe's `predict`, as the paper's Tables 3, 4 and 10."""


def masks(n_videos: int) -> dict[str, Any]:
    """Predict and score variants with and without what they share."""
    import torch

    from rcot_rl.evaluation.benchmarks import evaluate, evaluate_all
    from rcot_rl.inference.predict import CorpusSplit, Target, video_frames, write_expression
    from rcot_rl.segmentation.mask_store import MaskStore
    from rcot_rl.segmentation.segmenter import load_segmenter

    torch.set_num_threads(1)
    recipe = load_recipe("laptop", [f"predict.variants={json.dumps(VARIANTS)}"])
    milliseconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_corpus(root / "mevis", "mevis", "valid_u", n_videos, 1, "lattice")
        corpus = CorpusSplit("mevis", str(root / "mevis"), "valid_u").open()
        traced, milliseconds["answers"] = asyncio.run(_answers(corpus, recipe))
        n_predictions = sum(map(len, traced.values()))
        stores = {"masks": MaskStore(root / "store", 1 << 30), "masks, baseline": None}
        for name, store in stores.items():
            segmenter = load_segmenter("tiny", "cpu", recipe.segmenter)
            started = time.process_time()
            for video, answers in traced.items():
                frames = video_frames(corpus, video)
                for expression, variant, trace in answers:
                    place = root / name / (variant or "all") / video.id / expression
                    target = Target(expression, variant, str(place))
                    write_expression(target, video, trace, segmenter, frames, store)
            milliseconds[name] = 1000 * (time.process_time() - started) / n_predictions
        for png in (root / "masks").rglob("*.png"):
            other = root / "masks, baseline" / png.relative_to(root / "masks")
            if png.read_bytes() != other.read_bytes():
                raise SystemExit(f"{png.relative_to(root)} differs")
        methods = {place.name: place for place in sorted((root / "masks").iterdir())}
        place = "mevis", root / "mevis", "valid_u"
        started = time.process_time()
        together = evaluate_all(*place, methods)
        milliseconds["scores"] = 1000 * (time.process_time() - started) / n_predictions
        started = time.process_time()
        alone = {name: evaluate(*place, method) for name, method in methods.items()}
        milliseconds["scores, baseline"] = 1000 * (time.process_time() - started) / n_predictions
        if together != alone:
            raise SystemExit("scores differ")
        passes = len(list((root / "store").iterdir()))
    return {
        "part": "masks",
        "predictions": n_predictions,
        "passes_of_sam2": passes,
        "cpu_ms_per_prediction": {name: round(ms, 2) for name, ms in milliseconds.items()},
        "ratio_masks": milliseconds["masks, baseline"] / milliseconds["masks"],
        "ratio_scores": milliseconds["scores, baseline"] / milliseconds["scores"],
    }


async def _answers(corpus: Any, recipe: Any) -> tuple[dict[Any, list[Any]], float]:
    """Return video -> (expression, variant, trace), and CPU milliseconds per prediction."""
    from rcot_rl.inference.model_folder import TINY_TRAINED
    from rcot_rl.inference.predict import Target, trace_video, video_clip

    prompt_set = load_prompts(recipe.prompts, response=recipe.data.response)
    settings = {name: recipe.predict.reasoning(name) for name in (None, *VARIANTS)}
    limit = asyncio.Semaphore(recipe.predict.videos_per_engine)
    with PolicyEngine(TINY_TRAINED, recipe.engine, device="cpu") as policy:

        async def one(video: Any) -> list[Any]:
            async with limit:
                clip = video_clip(corpus, video)
                reasoner = VideoReasoner(clip, policy, prompt_set, recipe.canvas)
                targets = [Target(e.id, name, "") for e in video.expressions for name in settings]
                return await trace_video(corpus, video, targets, reasoner, settings)

        before = _cpu_seconds()
        videos = corpus.videos()
        answers = await asyncio.gather(*map(one, videos))
        seconds = _cpu_seconds() - before
    traced = {
        video: [(t.target.expression, t.target.variant, t.trace) for t in of_video]
        for video, of_video in zip(videos, answers, strict=True)
    }
    return traced, 1000 * seconds / sum(map(len, traced.values()))


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and its living children."""
    import psutil

    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _pool_seconds(root: Path, recipe: Any, file: Path, n_videos: int) -> float:
    """Return the seconds to predict the first videos, with the start of all processes."""
    from rcot_rl.inference.predict import CorpusSplit
    from rcot_rl.inference.prediction_pool import VideoWork, run_pool

    split = CorpusSplit("mevis", str(root / "mevis"), "valid_u")
    out = root / f"{file.stem}-{n_videos}"
    missing = dict(list(_missing(split, recipe, out).items())[:n_videos])
    work = [VideoWork("base", str(TINY), split, v, tuple(t)) for v, t in missing.items()]
    started = time.perf_counter()
    results = list(run_pool(recipe, file, work, {}))
    assert not any(result.fault for result in results)
    return time.perf_counter() - started


async def _loop(root: Path) -> float:
    """Reason about 16 queries, then segment them, and so on; return the seconds."""
    from rcot_rl.inference.predict import (
        CorpusSplit,
        trace_video,
        video_clip,
        video_frames,
        write_expression,
    )
    from rcot_rl.segmentation.segmenter import load_segmenter

    recipe = load_recipe("laptop")
    split = CorpusSplit("mevis", str(root / "mevis"), "valid_u")
    corpus, prompt_set = split.open(), load_prompts("compact")
    missing = _missing(split, recipe, root / "loop")
    segmenter = load_segmenter(recipe.models.segmenter, "cpu", recipe.segmenter)
    settings = {None: recipe.predict.reasoning()}
    videos = [v for v in corpus.videos() if v.id in missing]
    with PolicyEngine(TINY, recipe.engine, device="cpu") as policy:
        started = time.perf_counter()
        for first in range(0, len(videos), 4):
            batch = videos[first : first + 4]  # of four queries each
            reasoners = [
                VideoReasoner(video_clip(corpus, v), policy, prompt_set, recipe.canvas)
                for v in batch
            ]
            traced = await asyncio.gather(
                *(
                    trace_video(corpus, v, missing[v.id], r, settings)
                    for v, r in zip(batch, reasoners, strict=True)
                )
            )
            for video, results in zip(batch, traced, strict=True):
                for one in results:
                    assert one.trace is not None
                    frames = video_frames(corpus, video)
                    write_expression(one.target, video, one.trace, segmenter, frames)
        return time.perf_counter() - started


def _missing(split: Any, recipe: Any, out: Path) -> dict[str, Any]:
    from rcot_rl.inference.predict import open_set

    return open_set(split.open(), out, {"seed": recipe.seed}).missing


def main() -> None:
    """Run the parts and print one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="*", default=["vision", "aks", "pool", "masks"])
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--queries", type=int, default=3)
    chosen = parser.parse_args()
    for part in chosen.part:
        if part == "vision":
            row = asyncio.run(vision(chosen.videos, chosen.queries))
        elif part == "aks":
            print(json.dumps(asyncio.run(aks(chosen.videos, chosen.queries, 32))), flush=True)
            row = asyncio.run(aks(chosen.videos, chosen.queries, 240))
        elif part == "pool":
            row = pool(24 * chosen.videos)
        else:
            row = masks(3 * chosen.videos)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
