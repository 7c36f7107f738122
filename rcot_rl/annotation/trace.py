"""`rcot data trace`: reasoning for every SFT row of the plan, kept when its answer is right (3.4).

    OUT/traces.ledger.jsonl   every response, as it came
    OUT/traces.jsonl          every response with its verdict, in the plan's order, control
                              tokens neutralized: what `data.trace` of a recipe names

The plan is made first; each of its SFT instances is asked with the annotation at hand, again with
another seed when the answer is refused, and given up after so many tries. The plan is then made
again without those, until every row has its trace. `rcot data build` makes the same plan from the
same file.
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
from data_pipelines.planning.plan import Plan, make_plan
from data_pipelines.planning.row_drawing import SPLITS, Instance
from data_pipelines.planning.survey import (
    described,
    open_corpora,
    positions,
    survey,
    without_frames,
)
from data_pipelines.rows import truth_of
from data_pipelines.traces.response_cache import write_lines
from data_pipelines.traces.texts import Describer, TraceKey, open_descriptions
from data_pipelines.traces.trace_filter import Acceptance
from rcot_rl.annotation.session import Session, key_of, prompts_digest, ray_session, say
from rcot_rl.errors import InputError
from rcot_rl.inference.batch import UNREADABLE, Ask
from rcot_rl.inference.segmenter import label_judge
from rcot_rl.protocol.control_tokens import neutralize
from rcot_rl.protocol.prompts import TRACES, Prompts, load_prompts
from rcot_rl.recipe.data import has_traces
from rcot_rl.recipe.schema import Recipe

FILE = "traces.jsonl"
Truth = str | list[dict[str, list[int]]]


@dataclass(frozen=True)
class _Wanted:
    """An instance of the plan that needs a trace."""

    key: TraceKey
    truth: Truth
    text: str
    """The prompt."""
    image: str

    @property
    def kind(self) -> str:
        """What the plan counts apart: replacements are of the same kind."""
        if isinstance(self.truth, str):
            return f"aks {self.truth}"
        return "ktg multi" if len(self.truth) > 1 else "ktg single"


def trace(recipe: Recipe, out: Path) -> Path:
    """Trace every SFT row of the recipe; returns the file of traces.

    Raises InputError for corpora, models, prompts or descriptions at fault, when the corpora cannot
    replace what was given up, and when `tracer.replacements` rounds were not enough.
    """
    tracer = _Tracer(recipe, out)
    with tracer.session.ledger, ExitStack() as stack:
        for number in range(tracer.section.replacements + 1):
            wanted = tracer.plan_or_verdicts(out)
            missing = [w for w in wanted if tracer.state(w) is None]
            say(message=f"round {number}: {len(wanted)} rows, {len(missing)} without a trace")
            if not missing:
                break
            if not tracer.started:
                stack.enter_context(ray_session(recipe))
                tracer.started = True
            tracer.settle(missing + tracer.reserve(missing))
        wanted = tracer.plan_or_verdicts(out)
        missing = [w for w in wanted if tracer.state(w) is None]
        write_lines(out / FILE, tracer.lines(wanted))
    say(message=tracer.summary())
    if missing:
        raise InputError(
            f"{len(missing)} rows have no acceptable trace after "
            f"{tracer.section.replacements} replacements ({tracer.summary()})",
            file=out / FILE,
            key="data.tracer.replacements",
        )
    return out / FILE


class _Tracer:
    def __init__(self, recipe: Recipe, out: Path) -> None:
        data = recipe.data
        self.recipe, self.data, self.section = recipe, data, data.tracer
        if not any(has_traces(name) for name in data.sets):
            raise InputError("no set of the recipe is for SFT", key="data.sets")
        self.canvas = recipe.canvas.image if data.canvas is None else data.canvas
        self.seed = recipe.seed if data.seed is None else data.seed
        self.prompts: Prompts = load_prompts(recipe.prompts)
        self.corpora = open_corpora(data)
        self.describer: Describer = open_descriptions(data.describe, self.corpora)
        identity = {
            "canvas": self.canvas,
            "prompts": prompts_digest(self.prompts.templates, TRACES),
        }
        ledger = out / "traces.ledger.jsonl"
        self.session = Session(recipe, self.section, "trace", ledger, identity)
        judge = label_judge(recipe)
        found = survey(self.corpora, data, self.canvas, _scanned, judge, self.seed)
        self.facts = described(found, self.describer, data)
        self._decode: set[tuple[int, str, int]] = set()
        """Frames that do."""
        self.accept = Acceptance(self.section, self.canvas)
        # a greedy answer does not change
        self.tries = self.section.tries if self.section.temperature > 0 else 1
        self.refused: dict[TraceKey, _Wanted] = {}
        self._seen: dict[TraceKey, _Wanted] = {}
        self.started = False
        self._truths: dict[tuple[TraceKey, str], Truth] = {}
        self._verdicts: dict[str, tuple[str, ...]] = {}

    def plan_or_verdicts(self, out: Path) -> list[_Wanted]:
        """`plan_without_refused`; corpora that are used up have their verdicts written first, and
        told: what is wrong may be the tracer."""
        try:
            return self.plan_without_refused()
        except InputError as error:
            if not self.refused:
                raise
            write_lines(out / FILE, self.lines([]))
            raise InputError(
                f"{error.message}, after {self.summary()}; what was refused, and why, is here",
                file=out / FILE,
                key=error.key,
            ) from error

    def plan_without_refused(self) -> list[_Wanted]:
        """The plan, made again until it holds nothing that was given up."""
        while True:
            wanted = self.plan(self.refused)
            refused = [w for w in wanted if self.state(w) is False]
            if not refused:
                return wanted
            self.refused |= {w.key: w for w in refused}

    def plan(self, without: Collection[TraceKey]) -> list[_Wanted]:
        """The SFT instances of the plan without those, in its order, each once."""
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

    def _readable_plan(self, without: Collection[TraceKey]) -> Plan:
        """The plan that a build ends with: every frame of every set decodes."""
        while True:
            off = positions(self.facts, self.corpora, without)
            plan = make_plan(self.facts, self.data, self.seed, off)
            every = (row for rows in plan.rows.values() for row in rows)
            at = {(row.corpus, row.video, row.frame_index): row for row in every}
            new = {place: row for place, row in at.items() if place not in self._decode}
            faults = ordered_map(self._fault_of, new.values(), self.data.workers)
            spoiled = []
            for (place, row), fault in zip(new.items(), faults, strict=True):
                if fault is None:
                    self._decode.add(place)
                else:
                    spoiled.append((row, fault))
            if not spoiled:
                return plan
            self.facts = without_frames(self.facts, self.corpora, spoiled, self.data)

    def _fault_of(self, row: Instance) -> CorpusFault | None:
        corpus = self.corpora[row.corpus]
        try:
            corpus.frame(row.video, corpus.video(row.video).frames[row.frame_index])
        except CorpusFault as fault:
            return fault
        return None

    def reserve(self, missing: Sequence[_Wanted]) -> list[_Wanted]:
        """Those that would replace `missing`, and so on, as many as will likely be needed.

        They are asked along, since starting engines costs more than a few answers. Which traces are
        kept does not depend on it.
        """
        kept: dict[str, list[bool]] = defaultdict(list)
        for w in self._seen.values():
            kept[w.kind].append(self.state(w) is True)
        likely = 0.0
        for kind, n in Counter(w.kind for w in missing if w.kind in kept).items():
            share = max(sum(kept[kind]) / len(kept[kind]), 0.05)
            likely += n * (1 - share) / share
        out: dict[TraceKey, _Wanted] = {}
        off = {*self.refused, *(w.key for w in missing)}
        while len(out) < likely:
            try:
                found = [w for w in self.plan(off) if w.key not in off]
            except InputError:  # the corpora have no more
                break
            new = [w for w in found if self.state(w) is None and w.key not in out]
            if not new:
                break
            out |= {w.key: w for w in new}
            off |= {w.key for w in new}
        return list(out.values())[: int(2 * likely)]

    def settle(self, wanted: Sequence[_Wanted]) -> None:
        """Ask until each has an accepted trace or no try left: once each, then all that is left."""
        for numbers in (range(1), range(1, self.tries)):
            waiting = [w for w in wanted if self.state(w) is None]
            self.session.ask([self._ask(w, n) for w in waiting for n in numbers])
        self._seen |= {w.key: w for w in wanted}

    def state(self, wanted: _Wanted) -> bool | None:
        """True: has an accepted trace; False: given up; None: still to be asked."""
        for number in range(self.tries):
            causes = self._causes(wanted, number)
            if causes is None:
                return None
            if not causes:
                return True
            if causes == (UNREADABLE,):
                return False
        return False

    def lines(self, wanted: Sequence[_Wanted]) -> Iterator[dict[str, Any]]:
        """Every response of the plan's rows, then of those that were given up."""
        settled = {w.key: w for w in wanted} | self.refused
        for w in settled.values():
            for number in range(self.tries):
                causes = self._causes(w, number)
                if causes is None:
                    break
                record = self.session.ledger.records[self._ask(w, number).key]
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
        """Verdicts by cause."""
        causes: Counter[str] = Counter()
        for found in self._verdicts.values():
            causes.update(found or ("accepted",))
        parts = [f"{cause} {n}" for cause, n in causes.most_common()]
        return f"{len(self._verdicts)} responses: {', '.join(parts)}"

    def _causes(self, wanted: _Wanted, number: int) -> tuple[str, ...] | None:
        """Why a try was refused; empty: accepted; None: not asked yet."""
        key = self._ask(wanted, number).key
        if key not in self.session.ledger:
            return None
        if key not in self._verdicts:
            record = self.session.ledger.records[key]
            if record.get("fault"):
                self._verdicts[key] = (record["fault"],)
            else:
                verdict = self.accept.verdict(wanted.key[0], record["response"], wanted.truth)
                self._verdicts[key] = verdict.causes
        return self._verdicts[key]

    def _ask(self, wanted: _Wanted, number: int) -> Ask:
        key = key_of(*wanted.key, number, prompt=wanted.text)
        seed = zlib.crc32(f"{self.recipe.seed}\0{key}".encode())
        return Ask(key, wanted.text, (wanted.image,), "image", self.canvas, seed)

    def _wanted(self, row: Instance, truth: Truth) -> _Wanted:
        corpus = self.corpora[row.corpus]
        video = corpus.video(row.video)
        expression = corpus.expression(video, row.expression_id)
        description = self.describer.description(row.corpus, row.dataset, row.video)
        answer = truth if isinstance(truth, str) else json.dumps(truth)
        text = self.prompts.trace(row.task, description, expression.text, answer, self.canvas)
        image = corpus.frame_path(video.id, video.frames[row.frame_index]).resolve()
        return _Wanted(self._key(row), truth, text, str(image))

    def _key(self, row: Instance) -> TraceKey:
        corpus: Corpus = self.corpora[row.corpus]
        frame = corpus.video(row.video).frames[row.frame_index]
        return (row.task, row.dataset, row.video, row.expression_id, frame)


def _scanned(what: str, done: int, total: int) -> None:
    if done == total:
        say(message=f"{what}: {total} videos")
