"""Build shard sets from corpora (`rcot data build`; paper, section 3.4)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.corpora import Corpus
from data_pipelines.parallel import Progress
from data_pipelines.planning.candidates import SPLITS
from data_pipelines.planning.sampling_plan import SamplingPlan, make_plan
from data_pipelines.planning.scan import VideoFacts
from data_pipelines.planning.survey import (
    open_corpora,
    positions,
    survey,
    without_frames,
    without_undescribed,
)
from data_pipelines.rows import RowMaker
from data_pipelines.shards import RowsFailed, SetSpec, write_set
from data_pipelines.tokens import TokenCounter
from data_pipelines.traces.texts import FileTraces, open_descriptions, open_traces
from data_pipelines.traces.trace_filter import TraceFilter
from rcot_rl.errors import InputError
from rcot_rl.protocol.control_tokens import neutralize
from rcot_rl.protocol.parser import parse_response
from rcot_rl.protocol.prompts import Prompts, load_prompts
from rcot_rl.recipe.data_section import DataSection, has_traces
from rcot_rl.system.files import writing

if TYPE_CHECKING:
    from rcot_rl.segmentation.segmenter import VideoSegmenter

logger = logging.getLogger(__name__)


def build(
    data: DataSection,
    out: Path,
    prompts_name: str,
    seed: int = 1,
    progress: Progress | None = None,
    canvas: int = 840,
    rewards: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
    policy: Path | None = None,
    limits: Mapping[str, Mapping[str, int]] | None = None,
    propagator: VideoSegmenter | None = None,
    announce: Callable[[str, Sequence[VideoFacts]], None] = lambda table, facts: None,
) -> dict[str, Any]:
    """Write every set of `data.sets` below `out`; finished sets of the same plan are kept.

    Raises InputError.

    Args:
        seed: Used when `data.seed` is None.
        progress: Called with (label, done, total) during the scan and for each shard.
        canvas: Side of the square that frames are resized to, in pixels.
        rewards: set -> stage -> name and sha256 of the reward, for the manifests.
        policy: Model folder whose tokens are counted; None: tokens are not counted.
        limits: set -> maximum `prompt_tokens` and `total_tokens` that training accepts.
        propagator: SAM2, required by `data.alignment.level: sam2`.
        announce: Called with the plan's table and the scan's facts before any image is decoded.

    Returns:
        {"plan": the plan's table, "sets": {set: manifest}}.
    """
    progress = progress or (lambda label, done, total: None)
    seed = seed if data.seed is None else data.seed
    counter = None if policy is None else TokenCounter(policy)
    extra_control = () if counter is None else counter.extra_control
    prompts = load_prompts(prompts_name, extra_control, data.response)
    if counter is not None:
        counter.vision_tokens(canvas)  # check the pixel contract before hours of reading
    out = Path(out).resolve()
    _check_writable(out)
    corpora = open_corpora(data)
    maker = _row_maker(data, corpora, prompts, canvas, counter)
    facts = survey(corpora, data, canvas, progress, propagator, seed)
    facts = without_undescribed(facts, maker.describer, data)
    inputs = _SetInputs(_recipe_of(data, prompts, seed, canvas), limits or {}, rewards or {}, maker)
    logger.info(
        "building %s in %s from %d corpora: prompts %s, canvas %d, seed %d, %s images, %d workers",
        ", ".join(data.sets),
        out,
        len(corpora),
        prompts.name,
        canvas,
        seed,
        data.media,
        data.workers,
    )
    while True:
        refused = maker.traces.refused if isinstance(maker.traces, FileTraces) else {}
        plan = make_plan(facts, data, seed, positions(facts, corpora, refused))
        announce(plan.table(), facts)
        try:
            return {"plan": plan.table(), "sets": _write(plan, data, facts, inputs, out, progress)}
        except RowsFailed as error:
            # only decoding shows these defects: plan again without the frames
            facts = without_frames(facts, error.faults, data)


def _write(
    plan: SamplingPlan,
    data: DataSection,
    facts: Sequence[VideoFacts],
    inputs: _SetInputs,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    sets = {}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for name in data.sets:
            spec = inputs.spec(name, plan, data, facts)
            sets[name] = write_set(spec, inputs.maker, out, data.workers, progress)
    return sets


def _check_writable(out: Path) -> None:
    """Raise InputError if the output folder cannot be created, before hours of reading."""
    parent = next(p for p in (out, *out.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError("cannot be written: not a folder, or no permission", file=parent)


def _row_maker(
    data: DataSection,
    corpora: Sequence[Corpus],
    prompts: Prompts,
    canvas: int,
    counter: TokenCounter | None,
) -> RowMaker:
    # of a file, the refused instances count also if responses have no reasoning
    needed = data.response == "think_answer" or data.trace not in ("template", "model")
    traced = needed and any(has_traces(name) for name in data.sets)
    traces = open_traces(data.trace, corpora) if traced else None
    return RowMaker(
        corpora=corpora,
        prompts=prompts,
        describer=open_descriptions(data.describe, corpora),
        traces=traces,
        trace_filter=TraceFilter(data.tracer, canvas) if isinstance(traces, FileTraces) else None,
        response=data.response,
        canvas=canvas,
        zero_target=data.zero_target_share > 0,
        embed=data.media == "embedded",
        image_format=data.image_format,
        counter=counter,
        clip_frames=data.clip_frames,
        clip_tasks=tuple(data.clip_tasks),
    )


def _recipe_of(data: DataSection, prompts: Prompts, seed: int, canvas: int) -> dict[str, Any]:
    """Return what rows depend on besides the corpora; how and where they are built is left out."""
    templates = json.dumps(dict(prompts.templates), sort_keys=True)
    return {
        "data": data.model_dump(mode="json", exclude={"workers", "store"}),
        "seed": seed,
        "canvas": canvas,
        "prompts": prompts.name,
        "prompts_sha256": hashlib.sha256(templates.encode()).hexdigest(),
    }


@dataclass(frozen=True)
class _SetInputs:
    """Inputs of every set: the recipe and rewards for its manifest, and the row maker."""

    recipe: Mapping[str, Any]
    limits: Mapping[str, Mapping[str, int]]
    rewards: Mapping[str, Mapping[str, Mapping[str, str]]]
    maker: RowMaker

    def spec(
        self, name: str, plan: SamplingPlan, data: DataSection, facts: Sequence[VideoFacts]
    ) -> SetSpec:
        """Return the specification of one set."""
        defects = [asdict(d) for f in facts for d in f.defects]
        text = json.dumps(self.recipe, sort_keys=True, separators=(",", ":"))
        by_source = Counter(source_of(d["dataset"], d["video"]) for d in defects)
        traces = self._quoted(name)
        return SetSpec(
            name=name,
            rows={split: plan.rows.get((name, split), ()) for split in SPLITS},
            recipe=self.recipe,
            recipe_hash=hashlib.sha256(text.encode()).hexdigest(),
            dropped={
                "expressions": dict(plan.left_out),
                "defects_by_reason": dict(sorted(Counter(d["reason"] for d in defects).items())),
                "defects_by_source": dict(sorted(by_source.items())),
                "defects": defects,
            },
            plan=[asdict(p) for p in plan.lines if p.set_name == name],
            texts_digest="".join([*self._digests(), *self._neutralized(name, plan)]),
            corpora_digest=hashlib.sha256("".join(f.digest for f in facts).encode()).hexdigest(),
            rows_per_shard=data.rows_per_shard,
            limits=self.limits.get(name, {}),
            traces=traces.statistics if traces is not None else {},
            rewards=self.rewards.get(name, {}),
        )

    def _quoted(self, name: str) -> FileTraces | None:
        """Return the file of traces whose reasoning the set's rows hold; None without one."""
        traces, form = self.maker.traces, self.maker.response
        quotes = has_traces(name) and form == "think_answer"
        return traces if quotes and isinstance(traces, FileTraces) else None

    def _digests(self) -> list[str]:
        digests = [self.maker.describer.fingerprint()]
        if isinstance(self.maker.traces, FileTraces):
            digests.append(self.maker.traces.digest)
        elif self.maker.traces is not None:
            digests += [s.digest for s in self.maker.traces]
        if self.maker.counter is not None:
            digests.append(self.maker.counter.digest)
        return digests

    def _neutralized(self, name: str, plan: SamplingPlan) -> list[str]:
        """Return the neutralized form of the set's texts that hold control tokens.

        They are part of the fingerprint: a set that an earlier version finished without
        neutralizing them is rebuilt. Empty for clean corpora.
        """
        control, maker = self.maker.prompts.extra_tokens, self.maker
        traces = self._quoted(name)
        texts: set[str] = set()
        for row in (r for split in SPLITS for r in plan.rows.get((name, split), ())):
            corpus = maker.corpora[row.corpus]
            video = corpus.video(row.video)
            texts.add(corpus.expression(video, row.expression_id).text)
            texts.add(maker.describer.description(row.corpus, row.dataset, row.video))
            if traces is not None:
                response = traces.response_for(row, video.frames[row.frame_index])
                texts.add(parse_response(response).thought or "")
        return sorted(plain for t in texts if (plain := neutralize(t, control)) != t)


def defects_text(facts: Sequence[VideoFacts]) -> str:
    """Return the quarantined defects by reason and source, for people; empty if there are none."""
    defects = [d for f in facts for d in f.defects]
    if not defects:
        return ""
    counts = Counter((d.reason, source_of(d.dataset, d.video)) for d in defects)
    lines = [f"{len(defects)} defects quarantined (each with its place in manifest.json):"]
    lines += [f"  {n:>6}  {reason:<24}{source}" for (reason, source), n in sorted(counts.items())]
    return "\n".join(lines)


def source_of(dataset: str, video: str) -> str:
    """Return the origin of a video; ReVOS names the source corpus in the video's first folder."""
    parts = video.split("/")[:-1]
    return "/".join([dataset, *parts[:1]])
