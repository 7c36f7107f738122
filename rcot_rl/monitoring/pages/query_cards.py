"""The report's section of queries: what each checkpoint pointed at, and the masks that followed.

The section shows expressions of each benchmark: those that gained and lost most between the first
and the last checkpoint, and others evenly spaced from the best to the worst J&F, so that failures
are shown too. A card has the keyframe of each checkpoint with the outlines of the true and the
predicted mask, boxes and points; the description of the video; the judgements of the keyframe
selection; and a clip of the last checkpoint's masks. What cannot be drawn is replaced by the
reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.corpora import Corpus, CorpusFault, open_corpus
from data_pipelines.corpora.corpus import Expression, Video
from rcot_rl.errors import InputError
from rcot_rl.monitoring.pages.embedded_media import (
    LONGEST_THUMBNAIL,
    MOST_CLIP_FRAMES,
    FrameSheet,
    clip_uri,
    draw_masks,
    jpeg_uri,
)
from rcot_rl.monitoring.pages.figures import at, is_number
from rcot_rl.monitoring.pages.page import details, folds, missing, section, text
from rcot_rl.monitoring.pages.svg_overlay import MARK_KINDS, Overlay, marks_legend
from rcot_rl.monitoring.run_files.marks import BOX, POINT, PREDICTED, TRUTH
from rcot_rl.monitoring.run_files.prediction_files import (
    ShownStep,
    ShownTrace,
    read_mask,
    read_trace,
    true_mask,
)
from rcot_rl.monitoring.run_files.run_reader import RunReader, as_mapping
from rcot_rl.prediction_layout import benchmark_predictions, expression_folder
from rcot_rl.stats.intervals import shown_change
from rcot_rl.stats.spacing import evenly_spaced

MOST_QUERIES = 12
"""Queries on the page, evenly spaced over J&F, without the largest gains and losses."""

MOST_COLUMNS = 5
"""Checkpoints side by side: the first, the last, and evenly between them; then variants."""

LARGEST_GAIN, LARGEST_LOSS = "largest gain", "largest loss"
"""Labels of queries."""

DESCRIPTION = 160
"""Characters of the video's description beside a keyframe; the responses have the whole one."""

MOST_OBJECTS = 50
MOST_JUDGEMENTS = 12
MOST_RESPONSES = 40

_DRAWING_ERRORS = (InputError, CorpusFault, OSError, ValueError)


class Column(NamedTuple):
    """Predictions of one checkpoint on a benchmark."""

    name: str
    folder: Path
    scores: Mapping[tuple[str, str], float]
    """(video, expression id) -> J&F."""


class Query(NamedTuple):
    """An expression that the page shows."""

    video: str
    expression_id: str
    score: float
    """J&F of the last checkpoint."""

    rank: int
    """1 for the highest J&F."""

    change: float | None
    """Difference of the shown scores of the first and the last checkpoint; None with one."""

    label: str
    """`LARGEST_GAIN`, `LARGEST_LOSS`, or empty."""


def queries_section(reader: RunReader) -> str:
    """Return the section as HTML; empty before a benchmark is scored."""
    scores = reader.scores()
    if not scores:
        return ""
    sheet = FrameSheet("queries")
    each = max(2, MOST_QUERIES // len(scores))
    parts = [
        _benchmark(reader.root, name, result, each, sheet, unfold=index == 0)
        for index, (name, result) in enumerate(scores.items())
    ]
    note = (
        "The expressions of each benchmark that gained and lost most between the first and the "
        "last checkpoint, then some from the best to the worst J&amp;F. Below each keyframe: the "
        "description of the video, and the frames that the keyframe selection judged. A accepts "
        "the frame, B refuses it; A is right if the frame shows the target."
    )
    return section(
        "Queries",
        f'<p class="soft">{note}</p>',
        marks_legend(MARK_KINDS),
        "".join(parts),
        sheet.html(),
    )


def columns(run: Path, benchmark: str, result: Mapping[str, Any]) -> list[Column]:
    """Return the checkpoints to show side by side, in the order of the run, then a few variants.

    Variants (`<checkpoint>@<variant>`) are those of the last checkpoint, while there is room.
    Checkpoints whose name cannot name a folder are left out.

    Args:
        benchmark: `<dataset>-<split>`; runs of older versions have only the dataset.
        result: RUN/eval/<benchmark>.json.
    """
    results = as_mapping(at(result, "checkpoints"))
    results = {n: r for n, r in results.items() if _names_folder(n)}
    results = results or {"last checkpoint": result}
    plain = [name for name in results if not is_variant(name)] or list(results)
    last = plain[-1]
    shown = [plain[i] for i in evenly_spaced(len(plain), MOST_COLUMNS)]
    variants = [name for name in results if name.startswith(f"{last}@")]
    shown += variants[: MOST_COLUMNS - len(shown)]
    folders = {name: None if name == last else name for name in shown}
    return [
        Column(name, benchmark_predictions(run, benchmark, folder), _scores(results[name]))
        for name, folder in folders.items()
    ]


def _names_folder(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def is_variant(name: str) -> bool:
    """Return True if a name is `<checkpoint>@<variant>`."""
    return "@" in name


def choose(first: Column, last: Column, most: int) -> list[Query]:
    """Return up to `most` expressions from best to worst, and the largest gain and loss."""
    ranked = sorted(last.scores, key=lambda key: (-last.scores[key], key))
    changes = {
        key: shown_change(first.scores[key], last.scores[key], 1)
        for key in ranked
        if first is not last and key in first.scores
    }
    labels: dict[tuple[str, str], str] = {}
    if changes:
        loss, gain = min(changes, key=changes.__getitem__), max(changes, key=changes.__getitem__)
        if changes[loss] < 0:
            labels[loss] = LARGEST_LOSS
        if changes[gain] > 0:
            labels[gain] = LARGEST_GAIN
    chosen = {ranked[i] for i in evenly_spaced(len(ranked), most)} | set(labels)
    return [
        Query(*key, last.scores[key], rank, changes.get(key), labels.get(key, ""))
        for rank, key in enumerate(ranked, start=1)
        if key in chosen
    ]


def _scores(result: Any) -> dict[tuple[str, str], float]:
    rows = at(result, "per_expression")
    scores: dict[tuple[str, str], float] = {}
    for row in rows if isinstance(rows, list) else []:
        video, name, score = (at(row, key) for key in ("video", "expression_id", "J&F"))
        if isinstance(video, str) and isinstance(name, str) and is_number(score):
            scores.setdefault((video, name), float(score))
    return scores


def _benchmark(
    run: Path, name: str, result: Mapping[str, Any], each: int, sheet: FrameSheet, unfold: bool
) -> str:
    """Return the cards of a benchmark, largest changes first; `unfold`: show all of the first."""
    dataset, root, split = (str(result.get(key, "")) for key in ("benchmark", "root", "split"))
    title = f"<h3>{text(name, 100)}</h3>"
    try:
        corpus = open_corpus(dataset, root, split)
        corpus.videos()
    except InputError as error:
        return title + missing(f"the corpus of {name}, for its frames ({error})")
    shown = columns(run, name, result)
    plain = [column for column in shown if not is_variant(column.name)] or shown
    first, last = plain[0], plain[-1]
    chosen = choose(first, last, each)
    if not chosen:
        return title + missing(f"expressions with a J&F in eval/{name}.json")
    cards: list[str] = []
    for query in sorted(chosen, key=lambda q: not q.label):
        try:
            video = corpus.video(query.video)
            card = _Card(corpus, video, corpus.expression(video, query.expression_id), query, sheet)
        except KeyError:
            cards.append(missing(f"{query.video} / {query.expression_id}: not in the corpus"))
            continue
        cards.append(card.html(shown, last, unfold and not cards))
    return f'{title}<div class="queries">{"".join(cards)}</div>'


class _Card:
    """One expression with the predictions of all columns."""

    def __init__(
        self, corpus: Corpus, video: Video, expression: Expression, query: Query, sheet: FrameSheet
    ) -> None:
        self._corpus, self._video, self._expression = corpus, video, expression
        self._query, self._sheet = query, sheet
        self._name = f"{query.video} / {query.expression_id}"
        self._frame = lru_cache(MOST_CLIP_FRAMES)(self._read_frame)
        self._truth = lru_cache(MOST_CLIP_FRAMES)(self._read_truth)

    def html(self, shown: Sequence[Column], last: Column, unfolded: bool) -> str:
        """Return the card.

        Args:
            shown: The columns, side by side.
            last: The last checkpoint; the clip and the summary show its predictions.
            unfolded: Show more than the summary.
        """
        query = self._query
        drawn = {column.name: self._column(column) for column in shown}
        figures = "".join(column.html for column in drawn.values()) + self._clip(last)
        traces = folds(*(self._trace(column) for column in shown))
        scores = [c.scores.get(query[:2]) for c in shown if not is_variant(c.name)]
        facts = [
            text(self._name, 200),
            f"rank {query.rank} of {len(last.scores)}",
            f"J&amp;F {' → '.join(map(_score, scores))}",
        ]
        if query.change is not None:
            style = "up" if query.change > 0 else "down" if query.change < 0 else "soft"
            sign = f"{query.change:+.1f}" if query.change else "unchanged"
            label = f"{query.label} " if query.label else ""
            facts.append(f'<b class="{style}">{label}{sign}</b>')
        summary = (
            f"{drawn[last.name].thumbnail}<span>"
            f"<b>{text(self._expression.text, 400)}</b><small>{' · '.join(facts)}</small></span>"
        )
        return (
            f'<details class="query"{" open" if unfolded else ""}><summary>{summary}</summary>'
            f'<div class="columns">{figures}</div>{traces}</details>'
        )

    def _column(self, column: Column) -> _Drawn:
        name, score = text(column.name, 60), _score(column.scores.get(self._query[:2]))
        head = f"<figcaption><b>{name}</b> J&amp;F {score}</figcaption>"
        try:
            trace = self._read(column)
            drawing, thumbnail = self._drawing(column, trace)
            rounds = self._rounds(trace)
        except _DRAWING_ERRORS as error:
            return _Drawn(f"<figure>{head}{self._undrawn(error)}</figure>", "")
        facts = f"keyframe {trace.keyframe + 1} of {len(self._video.frames)}"
        if trace.initial_keyframe is not None and trace.initial_keyframe != trace.keyframe:
            facts += f", first choice {trace.initial_keyframe + 1}"
        if not self._truth(trace.keyframe).any():
            facts += ", no target in this frame"
        facts = f'<p class="facts">{facts}</p>'
        if trace.description:
            facts += f'<p class="facts">“{text(trace.description, DESCRIPTION)}”</p>'
        return _Drawn(f"<figure>{head}{drawing}{facts}{rounds}</figure>", thumbnail)

    def _drawing(self, column: Column, trace: ShownTrace) -> tuple[str, str]:
        frame, truth = self._frame(trace.keyframe), self._truth(trace.keyframe)
        folder = self._folder(column)
        mask = read_mask(folder, self._video.frames[trace.keyframe], frame.shape[:2])
        overlay = Overlay(frame.shape[1], frame.shape[0])
        overlay.outline(truth, TRUTH, "truth", dashed=True)
        overlay.outline(mask, PREDICTED, "predicted")
        overlay.boxes(trace.boxes_source[:MOST_OBJECTS], BOX, "box")
        overlay.points(trace.points_source[:MOST_OBJECTS], POINT, "point")
        name = self._sheet.add(frame)
        alt = (
            f"Keyframe of {self._name} chosen by {column.name}, with the outlines of the true and "
            f"the predicted mask, {len(trace.boxes_source)} boxes and their points"
        )
        return overlay.svg(name, alt), overlay.svg(name)

    def _rounds(self, trace: ShownTrace) -> str:
        """Return the judged frames in order, each with the verdict."""
        judged = trace.judgements[:MOST_JUDGEMENTS]
        if not judged:
            return ""
        cells = "".join(self._judgement(step) for step in judged)
        last = judged[-1].frame
        if last != trace.keyframe:
            cells += f'<li class="soft">then frame {trace.keyframe + 1}, not judged</li>'
        return f'<ol class="rounds" aria-label="Judgements of the keyframe selection">{cells}</ol>'

    def _judgement(self, step: ShownStep) -> str:
        index = step.frame or 0
        if not 0 <= index < len(self._video.frames):
            return f"<li>{self._undrawn(ValueError(f'frame {index} of the judgement'))}</li>"
        truth = self._truth(index)
        verdict = {"A": "A, accepted", "B": "B, refused", None: "no verdict"}[step.option]
        right = step.option == ("A" if truth.any() else "B")
        probability = (step.option_probabilities or {}).get("A")
        chance = "" if probability is None else f"<small>p(A) {probability:.2f}</small>"
        overlay = Overlay(truth.shape[1], truth.shape[0])
        overlay.outline(truth, TRUTH, "truth", dashed=True)
        visible = "the target is visible" if truth.any() else "the target is not visible"
        alt = f"Frame {index + 1}: {verdict}; {visible}"
        drawing = overlay.svg(self._sheet.add(self._frame(index), LONGEST_THUMBNAIL), alt)
        return (
            f"<li>{drawing}<small>frame {index + 1}</small><small>{verdict}</small>"
            f'<small class="{"up" if right else "down"}">{"right" if right else "wrong"}</small>'
            f"{chance}</li>"
        )

    def _clip(self, column: Column) -> str:
        """Return the clip of a column's masks, or why there is none."""
        head = f"<figcaption><b>Masks of {text(column.name, 60)}</b></figcaption>"
        try:
            folder = self._folder(column)
            shown = evenly_spaced(len(self._video.frames), MOST_CLIP_FRAMES)
            pictures = []
            for index in shown:
                frame = self._frame(index)
                mask = read_mask(folder, self._video.frames[index], frame.shape[:2])
                pictures.append(draw_masks(frame, mask, self._truth(index)))
            if len({picture.shape for picture in pictures}) > 1:
                raise ValueError("the frames of the video have several sizes")
            rate = min(max(len(shown) // 4, 4), 12)
            video, poster = clip_uri(pictures, rate), jpeg_uri(pictures[len(pictures) // 2])
        except _DRAWING_ERRORS as error:
            return f"<figure>{head}{self._undrawn(error)}</figure>"
        height, width = pictures[0].shape[:2]
        label = f"Clip of {self._name}: predicted masks tinted, ground truth outlined"
        part = "" if len(shown) == len(self._video.frames) else f" of {len(self._video.frames)}"
        return (
            f'<figure>{head}<video controls muted loop playsinline preload="none" width="{width}" '
            f'height="{height}" poster="{poster}" aria-label="{text(label)}" src="{video}"></video>'
            f'<p class="facts">{len(shown)}{part} frames; tint: prediction, outline: ground truth'
            "</p></figure>"
        )

    def _trace(self, column: Column) -> str:
        try:
            trace = self._read(column)
        except _DRAWING_ERRORS:
            return ""
        parts = [f"<p><b>description</b></p><pre>{text(trace.description)}</pre>"]
        for step in trace.steps[:MOST_RESPONSES]:
            frame = "" if step.frame is None else f", frame {step.frame + 1}"
            parts.append(
                f"<p><b>{text(step.task, 40)}</b>{frame}</p><pre>{text(step.response)}</pre>"
            )
        if trace.faults:
            parts.append(f"<p>Faults: {text(', '.join(trace.faults), 1000)}</p>")
        parts.append(f"<p>Masks by {text(trace.segmenter or 'unknown', 60)}</p>")
        title = f"Responses of {text(column.name, 60)} ({len(trace.steps)})"
        return details(title, "".join(parts))

    def _undrawn(self, error: Exception) -> str:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return missing(f"{self._name}: cannot be drawn ({reason})")

    def _folder(self, column: Column) -> Path:
        return expression_folder(
            column.folder, self._query.video, self._query.expression_id, allow_hidden=True
        )

    def _read(self, column: Column) -> ShownTrace:
        return read_trace(self._folder(column), len(self._video.frames))

    def _read_frame(self, index: int) -> np.ndarray:
        return self._corpus.frame(self._video.id, self._video.frames[index])

    def _read_truth(self, index: int) -> np.ndarray:
        """Return the union of the objects' masks: bool [H, W]."""
        height, width = self._frame(index).shape[:2]
        return true_mask(self._corpus, self._video, self._expression, index, (height, width))


class _Drawn(NamedTuple):
    html: str
    thumbnail: str


def _score(score: float | None) -> str:
    return "–" if score is None else f"{score:.1f}"


QUERIES_STYLE = """\
.queries { display: grid; gap: 8px; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 900px) { .queries { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.queries > [open], .queries > .missing { grid-column: 1 / -1; }
.query { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 0;
  padding: 8px 12px; }
.query > summary { display: flex; gap: 12px; align-items: center; width: auto; color: var(--ink);
  font-size: 14px; }
.query > summary::before { content: "\\25b8"; color: var(--soft); }
.query[open] > summary::before { content: "\\25be"; }
.query > summary > .marks { width: 64px; flex: none; }
.query > summary > span { min-width: 0; overflow-wrap: anywhere; }
.columns { display: grid; gap: 12px; margin: 12px 0 8px;
  grid-template-columns: repeat(auto-fit, minmax(min(190px, 46%), 1fr)); }
.query figure { border: 0; padding: 0; max-width: 360px; }
.query video { display: block; width: 100%; height: auto; border-radius: 4px;
  background: var(--line); }
.facts { font-size: 12px; color: var(--soft); margin: 4px 0; }
.rounds { display: flex; flex-wrap: wrap; gap: 8px; list-style: none; margin: 6px 0; padding: 0; }
.rounds li { width: 84px; font-size: 12px; }
"""
