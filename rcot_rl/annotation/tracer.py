"""Trace every SFT row of the plan with a model (`rcot data trace`; paper, 3.4).

    OUT/traces.ledger.jsonl   the response cache
    OUT/traces.jsonl          every response with its verdict, in the plan's order, control
                              tokens neutralized; the value of the recipe's `data.trace`

The plan is made first. Each of its SFT instances is sent to the model with its annotation, again
with another seed if the response is refused, and given up after `tracer.tries`. Then the plan is
made again without those, until every row has its trace. `rcot data build` makes the same plan from
the same file.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.corpora import Corpus, CorpusFault
from data_pipelines.parallel import ordered_map
from data_pipelines.planning.candidates import SPLITS
from data_pipelines.planning.row_drawing import Instance
from data_pipelines.planning.sampling_plan import SamplingPlan, make_plan
from data_pipelines.planning.survey import (
    open_corpora,
    positions,
    survey,
    without_frames,
    without_undescribed,
)
from data_pipelines.rows import Truth, truth_of
from data_pipelines.traces.response_cache import write_lines
from data_pipelines.traces.texts import Describer, TraceKey, open_descriptions
from data_pipelines.traces.trace_filter import TraceFilter
from rcot_rl.annotation.annotation_process import FILES
from rcot_rl.annotation.annotator import Annotator, key_of, prompts_digest
from rcot_rl.errors import InputError
from rcot_rl.events import emit
from rcot_rl.inference.batch import UNREADABLE, Ask
from rcot_rl.inference.ray_session import ray_session
from rcot_rl.protocol.control_tokens import neutralize
from rcot_rl.protocol.prompts import TRACES, Prompts, load_prompts
from rcot_rl.recipe.data_section import has_traces
from rcot_rl.recipe.schema import Recipe
from rcot_rl.segmentation.segmenter import label_judge

FILE = FILES["trace"]


@dataclass(frozen=True)
class _TraceRequest:
    """An instance of the plan that needs a trace."""

    key: TraceKey
    truth: Truth
    text: str
    """The prompt."""
    image: str

    @property
    def kind(self) -> str:
        """Task and answer: a replacement is of the same kind."""
        if isinstance(self.truth, str):
            return f"aks {self.truth}"
        return "ktg multi" if len(self.truth) > 1 else "ktg single"


def trace(recipe: Recipe, out: Path) -> Path:
    """Trace every SFT row of the recipe. Raises InputError."""
    tracer = _Tracer(recipe, out)
    with tracer.annotator.cache, ExitStack() as stack:
        for number in range(tracer.section.replacements + 1):
            wanted = tracer.plan_or_verdicts(out)
            missing = [w for w in wanted if tracer.state(w) is None]
            emit(
                "note",
                message=f"round {number}: {len(wanted)} rows, {len(missing)} without a trace",
            )
            if not missing:
                break
            if not tracer.started:
                stack.enter_context(ray_session(recipe))
                tracer.started = True
            tracer.settle(missing + tracer.reserve(missing))
        wanted = tracer.plan_or_verdicts(out)
        missing = [w for w in wanted if tracer.state(w) is None]
        write_lines(out / FILE, tracer.lines(wanted))
    emit("note", message=tracer.summary())
    if missing:
        raise InputError(
            f"{len(missing)} rows have no acceptable trace after "
            f"{tracer.section.replacements} replacements ({tracer.summary()})",
            file=out / FILE,
            key="data.tracer.replacements",
        )
    return out / FILE


class _Tracer:
    """The state of one run: facts of the corpora, requests and verdicts."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        data = recipe.data
        self.recipe, self.data, self.section = recipe, data, data.tracer
        if not any(has_traces(name) for name in data.sets):
            raise InputError("the recipe has no SFT set", key="data.sets")
        self.canvas = recipe.canvas.image
        self.seed = recipe.data_seed
        self.prompts: Prompts = load_prompts(recipe.prompts)
        self.corpora = open_corpora(data)
        self.describer: Describer = open_descriptions(data.describe, self.corpora)
        identity = {
            "canvas": self.canvas,
            "prompts": prompts_digest(self.prompts.templates, TRACES),
        }
        cache = out / "traces.ledger.jsonl"
        self.annotator = Annotator(recipe, self.section, "trace", cache, identity)
        judge = label_judge(recipe)
        facts = survey(self.corpora, data, self.canvas, _scanned, judge, self.seed)
        self.facts = without_undescribed(facts, self.describer, data)
        self._decodable: set[tuple[int, str, int]] = set()
        """Frames known to decode."""
        self.trace_filter = TraceFilter(self.section, self.canvas)
        # a greedy response is always the same
        self.tries = self.section.tries if self.section.temperature > 0 else 1
        self.refused: dict[TraceKey, _TraceRequest] = {}
        self._seen: dict[TraceKey, _TraceRequest] = {}
        self.started = False
        self._truths: dict[tuple[TraceKey, str], Truth] = {}
        self._verdicts: dict[str, tuple[str, ...]] = {}

    def plan_or_verdicts(self, out: Path) -> list[_TraceRequest]:
        """Return `plan_without_refused`; if the corpora are exhausted, write the verdicts first.

        The cause may be the model, so the error refers to them.
        """
        try:
            return self.plan_without_refused()
        except InputError as error:
            if not self.refused:
                raise
            write_lines(out / FILE, self.lines([]))
            raise InputError(
                f"{error.message}, after {self.summary()}; the refused traces are listed here",
                file=out / FILE,
                key=error.key,
            ) from error

    def plan_without_refused(self) -> list[_TraceRequest]:
        """Plan again until the plan has no instance that was given up."""
        while True:
            wanted = self.plan(self.refused)
            refused = [w for w in wanted if self.state(w) is False]
            if not refused:
                return wanted
            self.refused |= {w.key: w for w in refused}

    def plan(self, without: Collection[TraceKey]) -> list[_TraceRequest]:
        """Return the SFT instances of a plan without those of `without`, in order, each once."""
        plan = self._readable_plan(without)
        rows = {
            (self._key(row), row.option): row
            for name in self.data.sets
            if has_traces(name)
            for split in SPLITS
            for row in plan.rows.get((name, split), ())
        }
        new = {key: row for key, row in rows.items() if key not in self._truths}
        truths = ordered_map(
            lambda row: truth_of(row, self.corpora, self.canvas), new.values(), self.data.workers
        )
        self._truths |= dict(zip(new, truths, strict=True))
        return [self._wanted(row, self._truths[key]) for key, row in rows.items()]

    def _readable_plan(self, without: Collection[TraceKey]) -> SamplingPlan:
        """Return the plan that a build ends with, in which every frame decodes."""
        while True:
            off = positions(self.facts, self.corpora, without)
            plan = make_plan(self.facts, self.data, self.seed, off)
            every = (row for rows in plan.rows.values() for row in rows)
            at = {(row.corpus, row.video, row.frame_index): row for row in every}
            new = {place: row for place, row in at.items() if place not in self._decodable}
            faults = ordered_map(self._fault_of, new.values(), self.data.workers)
            undecodable = []
            for (place, row), fault in zip(new.items(), faults, strict=True):
                if fault is None:
                    self._decodable.add(place)
                else:
                    undecodable.append((row, fault))
            if not undecodable:
                return plan
            self.facts = without_frames(self.facts, undecodable, self.data)

    def _fault_of(self, row: Instance) -> CorpusFault | None:
        corpus = self.corpora[row.corpus]
        try:
            corpus.frame(row.video, corpus.video(row.video).frames[row.frame_index])
        except CorpusFault as fault:
            return fault
        return None

    def reserve(self, missing: Sequence[_TraceRequest]) -> list[_TraceRequest]:
        """Return the instances that will probably have to replace some of `missing`.

        They are requested together, because starting engines costs more than a few responses. Which
        traces are accepted does not depend on it.
        """
        kept: dict[str, list[bool]] = defaultdict(list)
        for w in self._seen.values():
            kept[w.kind].append(self.state(w) is True)
        likely = 0.0
        for kind, n in Counter(w.kind for w in missing if w.kind in kept).items():
            share = max(sum(kept[kind]) / len(kept[kind]), 0.05)
            likely += n * (1 - share) / share
        out: dict[TraceKey, _TraceRequest] = {}
        off = {*self.refused, *(w.key for w in missing)}
        while len(out) < likely:
            try:
                planned = [w for w in self.plan(off) if w.key not in off]
            except InputError:  # the corpora have no more
                break
            new = [w for w in planned if self.state(w) is None and w.key not in out]
            if not new:
                break
            out |= {w.key: w for w in new}
            off |= {w.key for w in new}
        return list(out.values())[: int(2 * likely)]

    def settle(self, wanted: Sequence[_TraceRequest]) -> None:
        """Request traces until each has an accepted one or no try left: the first try, then all."""
        for numbers in (range(1), range(1, self.tries)):
            waiting = [w for w in wanted if self.state(w) is None]
            self.annotator.annotate([self._ask(w, n) for w in waiting for n in numbers])
        self._seen |= {w.key: w for w in wanted}

    def state(self, wanted: _TraceRequest) -> bool | None:
        """Return True if it has an accepted trace, False if it was given up, None if open."""
        for number in range(self.tries):
            causes = self._causes(wanted, number)
            if causes is None:
                return None
            if not causes:
                return True
            if causes == (UNREADABLE,):
                return False
        return False

    def lines(self, wanted: Sequence[_TraceRequest]) -> Iterator[dict[str, Any]]:
        """Yield every response of the plan's rows, then of those that were given up."""
        settled = {w.key: w for w in wanted} | self.refused
        for w in settled.values():
            for number in range(self.tries):
                causes = self._causes(w, number)
                if causes is None:
                    break
                record = self.annotator.cache.records[self._ask(w, number).key]
                names = ("task", "dataset", "video", "expression_id", "frame")
                yield {
                    **dict(zip(names, w.key, strict=True)),
                    "try": number,
                    "response": neutralize(record["response"], keep_tags=True),
                    "tokens": record["tokens"],
                    "accepted": not causes,
                    "causes": list(causes),
                }
                if not causes:
                    break

    def summary(self) -> str:
        """Return the number of responses by cause."""
        causes: Counter[str] = Counter()
        for verdict in self._verdicts.values():
            causes.update(verdict or ("accepted",))
        parts = [f"{cause} {n}" for cause, n in causes.most_common()]
        return f"{len(self._verdicts)} responses: {', '.join(parts)}"

    def _causes(self, wanted: _TraceRequest, number: int) -> tuple[str, ...] | None:
        """Return why a try was refused; empty if accepted, None if there is no response yet."""
        key = self._ask(wanted, number).key
        if key not in self.annotator.cache:
            return None
        if key not in self._verdicts:
            record = self.annotator.cache.records[key]
            if record.get("fault"):
                self._verdicts[key] = (record["fault"],)
            else:
                verdict = self.trace_filter.verdict(wanted.key[0], record["response"], wanted.truth)
                self._verdicts[key] = verdict.causes
        return self._verdicts[key]

    def _ask(self, wanted: _TraceRequest, number: int) -> Ask:
        key = key_of(*wanted.key, number, prompt=wanted.text)
        seed = zlib.crc32(f"{self.seed}\0{key}".encode())
        return Ask(key, wanted.text, (wanted.image,), "image", self.canvas, seed)

    def _wanted(self, row: Instance, truth: Truth) -> _TraceRequest:
        corpus = self.corpora[row.corpus]
        video = corpus.video(row.video)
        expression = corpus.expression(video, row.expression_id)
        description = self.describer.description(row.corpus, row.dataset, row.video)
        answer = truth if isinstance(truth, str) else json.dumps(truth)
        text = self.prompts.trace(row.task, description, expression.text, answer, self.canvas)
        image = corpus.frame_path(video.id, video.frames[row.frame_index]).resolve()
        return _TraceRequest(self._key(row), truth, text, str(image))

    def _key(self, row: Instance) -> TraceKey:
        corpus: Corpus = self.corpora[row.corpus]
        frame = corpus.video(row.video).frames[row.frame_index]
        return (row.task, row.dataset, row.video, row.expression_id, frame)


def _scanned(label: str, done: int, total: int) -> None:
    if done == total:
        emit("note", message=f"{label}: {total} videos")
