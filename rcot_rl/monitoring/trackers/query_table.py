"""Table of benchmark queries from best to worst, with their keyframes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from data_pipelines.corpora import Corpus, CorpusFault, open_corpus
from rcot_rl.errors import InputError
from rcot_rl.monitoring.pages.query_cards import Column, Query, choose, columns, is_variant
from rcot_rl.monitoring.run_files.prediction_files import read_mask, read_trace, true_mask
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.trackers.rollout_pictures import (
    PREDICTED,
    PREDICTED_MASK,
    TRUE,
    scaled_picture,
)
from rcot_rl.monitoring.trackers.rollout_tables import Cell, shown_text
from rcot_rl.monitoring.trackers.tracker import DataTable, Value
from rcot_rl.prediction_layout import expression_folder
from rcot_rl.recipe.tracking_section import TrackingSection

logger = logging.getLogger(__name__)

QUERIES = 12
"""Queries of a benchmark, evenly spaced from the best to the worst, beside the largest gain and
loss."""
_COLUMNS = ["benchmark", "rank", "why", "video", "expression", "picture", "J&F", "change"]
_COLUMNS += ["keyframe", "first keyframe", "AKS rounds", "description", "problem"]


def query_table(reader: RunReader) -> dict[str, Value]:
    """Return the queries of each benchmark, as predicted by the last checkpoint."""
    longest = (reader.recipe.tracking if reader.recipe else TrackingSection()).picture_pixels
    rows = []
    for benchmark, result in reader.scores().items():
        dataset, root, split = (str(result.get(key, "")) for key in ("benchmark", "root", "split"))
        try:
            corpus = open_corpus(dataset, root, split)
            corpus.videos()
        except InputError as error:
            logger.warning("no table of queries of %s: %s", benchmark, error)
            continue
        rows += _rows(reader, benchmark, result, corpus, longest)
    return {"queries": DataTable(_COLUMNS, rows)} if rows else {}


def _rows(
    reader: RunReader, benchmark: str, result: Mapping[str, Any], corpus: Corpus, longest: int
) -> list[list[Cell]]:
    shown = columns(reader.root, benchmark, result)
    plain = [column for column in shown if not is_variant(column.name)]
    if not plain or not plain[-1].scores:
        return []
    return [
        _row(benchmark, plain[-1], query, corpus, longest)
        for query in choose(plain[0], plain[-1], QUERIES)
    ]


def _row(benchmark: str, column: Column, query: Query, corpus: Corpus, longest: int) -> list[Cell]:
    row: list[Cell] = [benchmark, query.rank, query.label, query.video]
    scores: list[Cell] = [query.score, query.change]
    try:
        video = corpus.video(query.video)
        expression = corpus.expression(video, query.expression_id)
    except KeyError:
        return [*row, "", None, *scores, None, None, None, "", "not in the corpus"]
    try:
        folder = expression_folder(
            column.folder, query.video, query.expression_id, allow_hidden=True
        )
        trace = read_trace(folder, len(video.frames))
        name = video.frames[trace.keyframe]
        frame = corpus.frame(video.id, name)
        size = frame.shape[0], frame.shape[1]
        truth = true_mask(corpus, video, expression, trace.keyframe, size)
        predicted = read_mask(folder, name, size)
    except (InputError, CorpusFault, OSError, ValueError) as error:
        return [*row, expression.text, None, *scores, None, None, None, "", str(error)]
    points = [*trace.points_source, *[None] * len(trace.boxes_source)]
    picture = scaled_picture(
        frame,
        longest,
        objects={PREDICTED: list(zip(trace.boxes_source, points, strict=False))},
        masks={TRUE: truth, PREDICTED_MASK: predicted},
        caption=f"J&F {query.score:.1f}, keyframe {trace.keyframe + 1} of {len(video.frames)}",
    )
    facts: list[Cell] = [trace.keyframe, trace.initial_keyframe, trace.rounds]
    return [*row, expression.text, picture, *scores, *facts, shown_text(trace.description), ""]
