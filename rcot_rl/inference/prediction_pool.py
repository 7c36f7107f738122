"""Policy engines and segmenters on Ray Data, which work at the same time.

A row of the dataset is one video of one benchmark and checkpoint, with all of its missing queries,
or some held-out rows. An engine answers several rows at a time; finished traces go to a segmenter,
which writes the masks. Rows come in the order of the checkpoints, and each engine swaps its weights
when it has answered its rows of the checkpoint before.

Ray Data starts a process that died again and repeats its rows. Written predictions are complete, so
a repeated row writes the same files once more. A query whose frames cannot be read is reported and
stops nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipelines.corpora.corpus import Corpus, Video
from rcot_rl.errors import InputError
from rcot_rl.inference.policy import PolicyRequest, PolicySet, Sampling, gather_texts
from rcot_rl.inference.pool_size import pool_size
from rcot_rl.inference.predict import (
    CorpusSplit,
    Target,
    trace_video,
    video_clip,
    video_frames,
    write_expression,
)
from rcot_rl.inference.query_trace import as_dict, from_dict
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.recipe.schema import Recipe
from rcot_rl.segmentation.mask_store import mask_store

logger = logging.getLogger(__name__)

VIDEO_SHARE = 0.6
"""Share of an engine's KV cache for the videos that it works on; the rest is for texts, images and
responses."""


@dataclass(frozen=True)
class VideoWork:
    """All missing predictions of one video by one checkpoint."""

    checkpoint: str
    model: str
    """The checkpoint's folder."""
    corpus: CorpusSplit
    video: str
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class HeldoutWork:
    """Held-out rows to answer, `first` to `last` (exclusive)."""

    checkpoint: str
    model: str
    task: str
    files: tuple[str, ...]
    limit: int
    first: int
    last: int
    samples: int
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class PredictionResult:
    """One prediction was written, or could not be made."""

    work: VideoWork
    target: Target
    fault: str
    """Why there is no prediction; empty if there is one."""
    rules: tuple[str, ...]
    """Faults in the trace: fallback rules that were applied."""


@dataclass(frozen=True)
class HeldoutAnswers:
    """Responses to held-out rows."""

    work: HeldoutWork
    sampled: list[list[str]]
    greedy: list[list[str]]


def run_pool(
    recipe: Recipe,
    recipe_file: Path,
    work: Sequence[VideoWork | HeldoutWork],
    others: Mapping[str, str],
    masks: Path | None = None,
) -> Iterator[PredictionResult | HeldoutAnswers]:
    """Yield each result as soon as its row is done. Needs a connected Ray. Raises InputError.

    Args:
        recipe_file: The recipe, at a path that every node can read.
        others: Folders of the models that `predict.models` names.
        masks: Folder of the masks that equal prompts share; None: they share none.
    """
    import ray

    if not work:
        return
    size = pool_size(recipe)
    logger.info("prediction pool: %s, %d rows, models %s", size, len(work), dict(others))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    rows = [{"work": json.dumps(_to_json(one))} for one in work]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    ahead = recipe.predict.videos_per_engine
    plan = {"recipe": str(recipe_file), "others": dict(others)}
    reasoning: Any = ReasoningProcess  # a callable class, which the annotation does not know
    traced = dataset.map(
        reasoning,
        fn_constructor_kwargs=plan,
        compute=ray.data.ActorPoolStrategy(
            size=size.engines,
            max_tasks_in_flight_per_actor=ahead,
            max_concurrent_calls_per_actor=ahead,
        ),
        num_cpus=1,
        num_gpus=size.engine_gpus,
    )
    done = traced.flat_map(
        MaskProcess,
        fn_constructor_kwargs={"recipe": str(recipe_file), "masks": masks and str(masks)},
        compute=ray.data.ActorPoolStrategy(size=size.segmenters, max_tasks_in_flight_per_actor=2),
        num_cpus=1,
        num_gpus=size.segmenter_gpus,
    )
    try:
        for batch in done.iter_batches(batch_size=None, prefetch_batches=0):
            for text in batch["result"]:
                yield _result(json.loads(text))
    except Exception as error:
        raise _input_error(error) or error from None


class ReasoningProcess:
    """A process with a policy engine, and one for each other model."""

    def __init__(self, recipe: str, others: Mapping[str, str]) -> None:
        """Read the recipe; the engines start with the first row."""
        from rcot_rl.protocol.prompts import load_prompts

        self._recipe = load_recipe(recipe, stages=())
        self._others = dict(others)
        self._prompts = load_prompts(self._recipe.prompts, response=self._recipe.data.response)
        self._engines: EngineSlots | None = None
        self._corpora: dict[CorpusSplit, Corpus] = {}
        self._starting = asyncio.Lock()

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answer a row: add its traces or responses."""
        from vllm.v1.engine.exceptions import EngineDeadError

        work = _from_json(json.loads(row["work"]))
        async with self._starting:
            if self._engines is None:
                self._engines = EngineSlots(self._recipe, Path(work.model), self._others)
        try:
            async with self._engines.use(Path(work.model)) as policies:
                answers: Any
                if isinstance(work, HeldoutWork):
                    answers = await self._answer(work, policies)
                else:
                    answers = await self._trace(work, policies)
        except EngineDeadError:
            logger.exception("the engine died; this process ends, and Ray starts another")
            os._exit(1)  # Ray retries the rows of a process that dies, but not of one that raises
        return {"work": row["work"], "answers": json.dumps(answers)}

    async def _trace(self, work: VideoWork, policies: PolicySet) -> list[dict[str, Any]]:
        from rcot_rl.inference.pipeline import VideoReasoner

        recipe = self._recipe
        if work.corpus not in self._corpora:
            self._corpora[work.corpus] = await asyncio.to_thread(work.corpus.open)
        corpus = self._corpora[work.corpus]
        video = _video(corpus, work.video)
        reasoner = VideoReasoner(
            video_clip(corpus, video), policies, self._prompts, recipe.canvas, recipe.seed
        )
        variants = {target.variant for target in work.targets}
        settings = {variant: recipe.predict.reasoning(variant) for variant in variants}
        assert self._engines is not None
        async with self._engines.admit(len(video.frames), recipe.canvas.video):
            traced = await trace_video(corpus, video, work.targets, reasoner, settings)
        return [
            {
                "target": asdict(one.target),
                "trace": None if one.trace is None else as_dict(one.trace),
                "fault": one.fault,
            }
            for one in traced
        ]

    async def _answer(self, work: HeldoutWork, policies: PolicySet) -> dict[str, Any]:
        from rcot_rl.inference.heldout import heldout_requests, read_rows

        def read() -> list[PolicyRequest]:
            rows = read_rows([Path(file) for file in work.files], work.limit, work.task)
            return heldout_requests(rows, self._recipe.seed, work.first, work.last)

        requests = await asyncio.to_thread(read)
        policy = policies.checkpoint
        sampling = Sampling(work.max_tokens, n=work.samples, temperature=work.temperature)
        return {
            "sampled": await gather_texts(policy, requests, sampling),
            "greedy": await gather_texts(policy, requests, Sampling(work.max_tokens)),
        }


class EngineSlots:
    """The engines of a process: one that loads the checkpoints in turn, and the other models'."""

    def __init__(self, recipe: Recipe, model: Path, others: Mapping[str, str]) -> None:
        """Start the engines, which share the process's GPU memory. Raises InputError."""
        from rcot_rl.inference.engine import PolicyEngine

        section = recipe.engine
        if others:
            share = section.gpu_memory_utilization / (1 + len(others))
            section = section.model_copy(update={"gpu_memory_utilization": share})
        self._main = PolicyEngine(model, section, device=recipe.device, seed=recipe.seed)
        started = {
            folder: PolicyEngine(Path(folder), section, device=recipe.device, seed=recipe.seed)
            for folder in sorted(set(others.values()))
        }
        self._others = {name: started[folder] for name, folder in others.items()}
        self._changed = asyncio.Condition()
        self._users = 0
        self._videos = 0
        self._video_tokens = 0

    @asynccontextmanager
    async def use(self, model: Path) -> AsyncIterator[PolicySet]:
        """Provide the engines with the weights of `model`, which stay until the context ends.

        Weights are swapped when no row of another checkpoint is in progress.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._main.model == model or self._users == 0)
            if self._main.model != model:
                await self._main.load_checkpoint(model)
                self._changed.notify_all()
            self._users += 1
        try:
            yield PolicySet(self._main, self._others)
        finally:
            async with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def admit(self, n_frames: int, side: int) -> AsyncIterator[None]:
        """Wait until the video fits into the caches beside the admitted ones.

        A video that is evicted from the caches would be encoded again. A video larger than its
        share is admitted alone.
        """
        tokens = self._main.video_tokens(n_frames, side)
        room = VIDEO_SHARE * self._main.cache_tokens
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._videos == 0 or self._video_tokens + tokens <= room
            )
            self._videos, self._video_tokens = self._videos + 1, self._video_tokens + tokens
        try:
            yield
        finally:
            async with self._changed:
                self._videos, self._video_tokens = self._videos - 1, self._video_tokens - tokens
                self._changed.notify_all()


class MaskProcess:
    """A process with a segmenter."""

    def __init__(self, recipe: str, masks: str | None) -> None:
        """Read the recipe; the segmenter is loaded with the first traces."""
        self._recipe = load_recipe(recipe, stages=())
        self._store = mask_store(Path(masks) if masks else None, self._recipe.segmenter)
        self._segmenter: Any = None
        self._corpora: dict[CorpusSplit, Corpus] = {}

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Write the masks of a row's traces; pass other results on."""
        work, answers = _from_json(json.loads(row["work"])), json.loads(row["answers"])
        if isinstance(work, HeldoutWork):
            return [{"result": json.dumps({"work": _to_json(work), **answers})}]
        if work.corpus not in self._corpora:
            self._corpora[work.corpus] = work.corpus.open()
        corpus = self._corpora[work.corpus]
        video = _video(corpus, work.video)
        frames = video_frames(corpus, video)
        results = []
        for answer in answers:
            target, fault = Target(**answer["target"]), answer["fault"]
            trace = None if answer["trace"] is None else from_dict(answer["trace"])
            if trace is not None:
                try:
                    write_expression(target, video, trace, self._loaded(), frames, self._store)
                except InputError as error:
                    fault = str(error)
            result = {
                "work": _to_json(work),
                "target": asdict(target),
                "fault": fault,
                "rules": [] if trace is None else trace.faults,
            }
            results.append({"result": json.dumps(result)})
        return results

    def _loaded(self) -> Any:
        from rcot_rl.segmentation.segmenter import load_segmenter

        if self._segmenter is None:
            recipe = self._recipe
            self._segmenter = load_segmenter(
                recipe.models.segmenter, recipe.device, recipe.segmenter
            )
        return self._segmenter


def _video(corpus: Corpus, name: str) -> Video:
    return next(video for video in corpus.videos() if video.id == name)


def _to_json(work: VideoWork | HeldoutWork) -> dict[str, Any]:
    return {"kind": type(work).__name__, **asdict(work)}


def _from_json(values: dict[str, Any]) -> VideoWork | HeldoutWork:
    kind = values.pop("kind")
    if kind == HeldoutWork.__name__:
        return HeldoutWork(**values | {"files": tuple(values["files"])})
    corpus = CorpusSplit(**values["corpus"])
    targets = tuple(Target(**target) for target in values["targets"])
    return VideoWork(**values | {"corpus": corpus, "targets": targets})


def _result(values: dict[str, Any]) -> PredictionResult | HeldoutAnswers:
    work = _from_json(values["work"])
    if isinstance(work, HeldoutWork):
        return HeldoutAnswers(work, values["sampled"], values["greedy"])
    return PredictionResult(
        work, Target(**values["target"]), values["fault"], tuple(values["rules"])
    )


def _input_error(error: BaseException) -> InputError | None:
    """Return the InputError of a process, which Ray wraps in its own errors."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None)
        for one in (seen, cause):
            if isinstance(one, InputError):
                return InputError(one.message, file=one.file, key=one.key)
        seen = seen.__cause__ or seen.__context__
    return None
