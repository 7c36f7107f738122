"""Corpora to shard sets: open, scan, plan, write (`rcot data build`; paper, section 3.4)."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipelines.corpora import Corpus
from data_pipelines.parallel import Progress
from data_pipelines.planning.mask_alignment import Propagator
from data_pipelines.planning.plan import Plan, make_plan
from data_pipelines.planning.row_drawing import SPLITS
from data_pipelines.planning.scan import VideoFacts
from data_pipelines.planning.survey import (
    described,
    open_corpora,
    positions,
    survey,
    without_frames,
)
from data_pipelines.rows import RowMaker
from data_pipelines.shards import SetSpec, Spoiled, write_set
from data_pipelines.tokens import TokenCounter
from data_pipelines.traces.texts import FileTraces, open_descriptions, open_traces
from data_pipelines.traces.trace_filter import Acceptance
from rcot_rl.errors import InputError
from rcot_rl.files import writing
from rcot_rl.protocol.control_tokens import neutralize
from rcot_rl.protocol.parser import parse_response
from rcot_rl.protocol.prompts import Prompts, load_prompts
from rcot_rl.recipe.data import DataSection, has_traces


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
    propagator: Propagator | None = None,
    announce: Callable[[str, Sequence[VideoFacts]], None] = lambda table, facts: None,
) -> dict[str, Any]:
    """Writes every set of `data.sets` below `out`; sets already there for the same plan stay.

    seed, canvas: the recipe's, where `data` has none of its own.
    rewards: set -> stage -> name and sha256 of the reward, for the manifests.
    policy: the model folder whose tokens are counted; None: they are not.
    limits: set -> the most `prompt_tokens` and `total_tokens` that training takes.
    propagator: SAM2, when `data.alignment.level` asks for it.
    announce: told the plan's table and what the corpora gave, before an image is decoded.
    Returns {"plan": the table, "sets": {name: manifest}}. Raises InputError.
    """
    progress = progress or (lambda what, done, total: None)
    seed = seed if data.seed is None else data.seed
    canvas = canvas if data.canvas is None else data.canvas
    counter = None if policy is None else TokenCounter(policy)
    prompts = load_prompts(prompts_name, () if counter is None else counter.own)
    if counter is not None:
        counter.vision_tokens(canvas)  # the pixel contract, before hours of reading
    out = Path(out).resolve()
    _refuse_place(out)
    corpora = open_corpora(data)
    maker = _row_maker(data, corpora, prompts, canvas, counter)
    found = survey(corpora, data, canvas, progress, propagator, seed)
    facts = described(found, maker.describer, data)
    recipe = _recipe_of(data, prompts, seed, canvas)
    texts = _Texts(recipe, limits or {}, rewards or {}, maker)
    while True:
        refused = maker.traces.refused if isinstance(maker.traces, FileTraces) else {}
        plan = make_plan(facts, data, seed, positions(facts, corpora, refused))
        announce(plan.table(), facts)
        try:
            return {"plan": plan.table(), "sets": _write(plan, data, facts, texts, out, progress)}
        except Spoiled as spoiled:
            # what only decoding shows: the plan is made again without those frames
            facts = without_frames(facts, corpora, spoiled.faults, data)


def _write(
    plan: Plan,
    data: DataSection,
    facts: Sequence[VideoFacts],
    texts: _Texts,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    sets = {}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for name in data.sets:
            spec = texts.spec(name, plan, data, facts)
            sets[name] = write_set(spec, texts.maker, out, data.workers, progress)
    return sets


def _refuse_place(out: Path) -> None:
    """Raises InputError where no folder can be made, before hours of reading."""
    there = next(p for p in (out, *out.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError("cannot be written: not a folder, or not ours", file=there)


def _row_maker(
    data: DataSection,
    corpora: Sequence[Corpus],
    prompts: Prompts,
    canvas: int,
    counter: TokenCounter | None,
) -> RowMaker:
    traced = any(has_traces(name) for name in data.sets)
    traces = open_traces(data.trace, corpora) if traced else None
    return RowMaker(
        corpora=corpora,
        prompts=prompts,
        describer=open_descriptions(data.describe, corpora),
        traces=traces,
        accept=Acceptance(data.tracer, canvas) if isinstance(traces, FileTraces) else None,
        canvas=canvas,
        zero_target=data.zero_target_share > 0,
        embed=data.media == "embedded",
        image_format=data.image_format,
        counter=counter,
        clip_frames=data.clip_frames,
        clip_tasks=tuple(data.clip_tasks),
    )


def _recipe_of(data: DataSection, prompts: Prompts, seed: int, canvas: int) -> dict[str, Any]:
    """What rows depend on, short of the corpora: the number of workers is not among it."""
    templates = json.dumps(dict(prompts.templates), sort_keys=True)
    return {
        "data": data.model_dump(mode="json", exclude={"workers"}),
        "seed": seed,
        "canvas": canvas,
        "prompts": prompts.name,
        "prompts_sha256": hashlib.sha256(templates.encode()).hexdigest(),
    }


@dataclass(frozen=True)
class _Texts:
    """What goes into every set's manifest, and rows' texts."""

    recipe: Mapping[str, Any]
    limits: Mapping[str, Mapping[str, int]]
    rewards: Mapping[str, Mapping[str, Mapping[str, str]]]
    maker: RowMaker

    def spec(
        self, name: str, plan: Plan, data: DataSection, facts: Sequence[VideoFacts]
    ) -> SetSpec:
        """Of one set."""
        defects = [asdict(d) for f in facts for d in f.defects]
        text = json.dumps(self.recipe, sort_keys=True, separators=(",", ":"))
        by_source = Counter(source_of(d["dataset"], d["video"]) for d in defects)
        traces = self.maker.traces
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
            traces=traces.figures if isinstance(traces, FileTraces) and has_traces(name) else {},
            rewards=self.rewards.get(name, {}),
        )

    def _digests(self) -> list[str]:
        texts = [self.maker.describer.fingerprint()]
        if isinstance(self.maker.traces, FileTraces):
            texts.append(self.maker.traces.digest)
        elif self.maker.traces is not None:
            texts += [s.digest for s in self.maker.traces]
        if self.maker.counter is not None:
            texts.append(self.maker.counter.digest)
        return texts

    def _neutralized(self, name: str, plan: Plan) -> list[str]:
        """Texts of the set that hold control tokens, as rows have them; none of a clean corpus.

        A finished set of an earlier version, whose rows hold them unchanged, is built again.
        """
        own, maker = self.maker.prompts.own, self.maker
        texts: set[str] = set()
        for row in (r for split in SPLITS for r in plan.rows.get((name, split), ())):
            corpus = maker.corpora[row.corpus]
            video = corpus.video(row.video)
            texts.add(corpus.expression(video, row.expression_id).text)
            texts.add(maker.describer.description(row.corpus, row.dataset, row.video))
            if isinstance(maker.traces, FileTraces) and has_traces(name):
                response = maker.traces.response_for(row, video.frames[row.frame_index])
                texts.add(parse_response(response).thought or "")
        return sorted(plain for t in texts if (plain := neutralize(t, own)) != t)


def defects_text(facts: Sequence[VideoFacts]) -> str:
    """What was quarantined, by reason and source, for people; empty when nothing was."""
    defects = [d for f in facts for d in f.defects]
    if not defects:
        return ""
    counts = Counter((d.reason, source_of(d.dataset, d.video)) for d in defects)
    lines = [f"{len(defects)} defects quarantined (each with its place in manifest.json):"]
    lines += [f"  {n:>6}  {reason:<24}{source}" for (reason, source), n in sorted(counts.items())]
    return "\n".join(lines)


def source_of(dataset: str, video: str) -> str:
    """Where a video is from: ReVOS takes clips from other corpora and names them in folders."""
    parts = video.split("/")[:-1]
    return "/".join([dataset, *parts[:1]])
