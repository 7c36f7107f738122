"""Corpora to shard sets: open, scan, plan, write (`rcot data build`; paper, section 3.4)."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2

from data_pipelines.absent import with_foreign
from data_pipelines.acceptance import Acceptance
from data_pipelines.alignment import Propagator
from data_pipelines.candidates import Candidate
from data_pipelines.corpora import Corpus, CorpusFault, Video, open_corpus
from data_pipelines.drawing import SPLITS
from data_pipelines.parallel import ordered_map
from data_pipelines.plan import Plan, make_plan
from data_pipelines.rows import RowMaker
from data_pipelines.scan import Defect, VideoFacts, scan_video, unread_videos
from data_pipelines.shards import Progress, SetSpec, Spoiled, write_set
from data_pipelines.texts import (
    FileDescriptions,
    FileTraces,
    TraceKey,
    open_descriptions,
    open_traces,
)
from data_pipelines.tokens import TokenCounter
from rcot_rl.errors import InputError
from rcot_rl.files import writing
from rcot_rl.protocol.prompts import Prompts, load_prompts
from rcot_rl.recipe.alignment import AlignmentSection
from rcot_rl.recipe.data import DataSection, has_traces


def build(
    data: DataSection,
    out: Path,
    prompts_name: str,
    recipe_hash: str | None = None,
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

    recipe_hash: what the manifests call it; None: the hash of what rows depend on.
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
    prompts = load_prompts(prompts_name)
    counter = None if policy is None else TokenCounter(policy)
    if counter is not None:
        counter.vision_tokens(canvas)  # the pixel contract, before hours of reading
    out = Path(out).resolve()
    _refuse_place(out)
    corpora = open_corpora(data)
    maker = _row_maker(data, corpora, prompts, canvas, counter)
    found = survey(corpora, data, canvas, progress, propagator, seed)
    facts = _described(found, maker, data)
    recipe = _recipe_of(data, prompts, seed, canvas)
    texts = _Texts(recipe, recipe_hash, limits or {}, rewards or {}, maker)
    while True:
        refused = maker.traces.refused if isinstance(maker.traces, FileTraces) else {}
        plan = make_plan(facts, data, seed, positions(facts, corpora, refused))
        announce(plan.table(), facts)
        try:
            return {"plan": plan.table(), "sets": _write(plan, data, facts, texts, out, progress)}
        except Spoiled as spoiled:
            # what only decoding shows: the plan is made again without those frames
            facts = _without(facts, corpora, spoiled)
            _stop_if_broken(facts, data)


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


def _without(
    facts: Sequence[VideoFacts], corpora: Sequence[Corpus], spoiled: Spoiled
) -> list[VideoFacts]:
    """The same facts, with the frames of rows that could not be made unusable, and why."""
    found: dict[tuple[int, str], dict[int, CorpusFault]] = defaultdict(dict)
    for instance, fault in spoiled.faults:
        found[instance.corpus, instance.video].setdefault(instance.frame_index, fault)
    out = []
    for video in facts:
        faults = found.get((video.corpus, video.video))
        if faults:
            usable = video.usable_t.copy()
            usable[list(faults)] = False
            defects = [
                Defect(video.dataset, video.video, "", f.reason, f.place, f.detail)
                for _, f in sorted(faults.items())
            ]
            video = replace(video, usable_t=usable, defects=(*video.defects, *defects))
        out.append(video)
    return out


def open_corpora(data: DataSection) -> list[Corpus]:
    """The corpora of the recipe, with their metadata and masks' index read. Raises InputError."""
    corpora: list[Corpus] = []
    seen: dict[tuple[str, str], int] = {}
    for number, ref in enumerate(data.corpora):
        key = f"data.corpora[{number}]"
        if ref.root is None:
            raise InputError(f"{ref.dataset} has no root", key=f"{key}.root")
        corpus = open_corpus(ref.dataset, ref.root, ref.split, strict=False)
        if not corpus.has_masks:
            raise InputError(
                f"the split '{ref.split}' of {ref.dataset} has no masks to learn from",
                file=ref.root,
                key=f"{key}.split",
            )
        corpus.load()
        if not corpus.videos() and corpus.faults:
            raise InputError(f"no entry can be read; the first: {corpus.faults[0].fault}", key=key)
        for video in corpus.videos():
            other = seen.setdefault((corpus.dataset, video.id), number)
            if other != number:
                raise InputError(
                    f"video {video.id} is in data.corpora[{other}] too", file=ref.root, key=key
                )
        corpora.append(corpus)
    return corpora


def survey(
    corpora: Sequence[Corpus],
    data: DataSection,
    canvas: int,
    progress: Progress | None = None,
    propagator: Propagator | None = None,
    seed: int = 0,
) -> list[VideoFacts]:
    """What the plan is made of. Raises InputError for corpora that are broken beyond the recipe's
    patience."""
    if data.alignment.level == "sam2" and propagator is None:
        raise InputError("level sam2 needs a segmenter", key="data.alignment.level")
    # Images are spread over processes; OpenCV's own threads must not exist when those are forked.
    cv2.setNumThreads(1)
    say = progress or (lambda what, done, total: None)
    # SAM2 runs in this process: its threads and its device do not survive a fork
    workers = 1 if propagator is not None else data.workers
    facts = scan(corpora, workers, canvas, say, data.alignment, propagator)
    _stop_if_broken(facts, data)
    if data.zero_target_foreign:
        facts = with_foreign(facts, corpora, data.zero_target_foreign, seed)
    return facts


def _described(facts: Sequence[VideoFacts], maker: RowMaker, data: DataSection) -> list[VideoFacts]:
    """The same facts, without expressions of videos that have no description: a defect of each."""
    if not isinstance(maker.describer, FileDescriptions):
        return list(facts)
    out = []
    for video in facts:
        if (video.dataset, video.video) in maker.describer.texts or not video.expressions:
            out.append(video)
            continue
        place = str(maker.describer.path)
        defect = Defect(video.dataset, video.video, "", "no_description", place, "")
        out.append(replace(video, expressions=(), defects=(*video.defects, defect)))
    _stop_if_broken(out, data)
    return out


def positions(
    facts: Sequence[VideoFacts],
    corpora: Sequence[Corpus],
    refused: Collection[TraceKey],
) -> dict[str, frozenset[Candidate]]:
    """Task -> instances that no trace could be had of, as the plan's positions."""
    wanted: dict[tuple[str, str], list[TraceKey]] = defaultdict(list)
    for key in refused:
        wanted[key[1], key[2]].append(key)
    found: dict[str, set[Candidate]] = {"aks": set(), "ktg": set()}
    for v, video in enumerate(facts):
        for task, _, _, expression, frame in wanted.get((video.dataset, video.video), ()):
            frames = corpora[video.corpus].video(video.video).frames
            at = [e for e, facts_ in enumerate(video.expressions) if facts_.id == expression]
            if at and frame in frames and task in found:
                found[task].add(Candidate(v, at[0], frames.index(frame)))
    return {task: frozenset(candidates) for task, candidates in found.items()}


def scan(
    corpora: Sequence[Corpus],
    workers: int,
    canvas: int,
    progress: Progress,
    alignment: AlignmentSection | None = None,
    propagator: Propagator | None = None,
) -> list[VideoFacts]:
    """Facts of every video, in the corpora's order."""
    items = [(c, video) for c, corpus in enumerate(corpora) for video in corpus.videos()]
    out = []

    def one(item: tuple[int, Video]) -> VideoFacts:
        return scan_video(corpora[item[0]], *item, canvas, alignment, propagator)

    for facts in ordered_map(one, items, workers):
        out.append(facts)
        progress("scan", len(out), len(items))
    return [*out, *(f for c, corpus in enumerate(corpora) for f in unread_videos(corpus, c))]


def _stop_if_broken(facts: Sequence[VideoFacts], data: DataSection) -> None:
    defects = [d for f in facts for d in f.defects]
    shares = {
        "expressions": (
            sum(f.n_expressions - len(f.expressions) for f in facts),
            sum(f.n_expressions for f in facts),
        ),
        "frames": (
            sum(int((~f.usable_t).sum()) for f in facts),
            sum(f.usable_t.size for f in facts),
        ),
    }
    for what, (bad, total) in shares.items():
        if bad > data.max_fault_share * total:
            first = defects[0]
            raise InputError(
                f"{bad} of {total} {what} are defective, more than data.max_fault_share "
                f"{data.max_fault_share}; the first: {first.reason} {first.detail}".strip(),
                file=first.place,
            )


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
    recipe_hash: str | None
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
            recipe_hash=self.recipe_hash or hashlib.sha256(text.encode()).hexdigest(),
            dropped={
                "expressions": dict(plan.left_out),
                "defects_by_reason": dict(sorted(Counter(d["reason"] for d in defects).items())),
                "defects_by_source": dict(sorted(by_source.items())),
                "defects": defects,
            },
            plan=[asdict(p) for p in plan.lines if p.set_name == name],
            texts_digest="".join(self._digests()),
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
