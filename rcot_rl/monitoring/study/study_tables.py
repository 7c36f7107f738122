"""The tables of the paper on a study's page: our rows beside the paper's, and their effects."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from rcot_rl.monitoring.study.study_effects import (
    ALL,
    Effect,
    Setting,
    Study,
    Values,
    figure_of,
)
from rcot_rl.monitoring.study.study_markdown import (
    effect_text,
    interval_text,
    level_text,
    markdown_table,
    plain,
)
from rcot_rl.monitoring.study.study_sentences import effect_sentence, order_sentence
from rcot_rl.stats.paper_tables import PaperTable, paper_tables

EFFECT_HEAD = ["effect", "over clips", "over seeds"]

_AREA = ("keyframe_area_ratio_initial", "keyframe_area_ratio")
"""Figures of Table 13 that are compared: what AKS does to the area of the keyframe's target."""


class TableText(NamedTuple):
    """A table of the paper as Markdown, and what it shows."""

    markdown: str
    sentences: list[str]


def table_texts(study: Study) -> dict[str, TableText]:
    """Return the tables of the paper of which the study has any row, by name."""
    texts = {}
    for name, paper in paper_tables().items():
        settings = {row: study.setting(name, row) for row in paper.rows}
        measured = {row: setting for row, setting in settings.items() if setting is not None}
        if not measured:
            continue
        one = _figures(study, paper, measured) if paper.metrics else _scores(study, paper, measured)
        title = f"### Table {name.removeprefix('table-')}: {plain(paper.title)}"
        parts = [title, plain(paper.note), one.markdown, "\n".join(f"- {s}" for s in one.sentences)]
        absent = [plain(row) for row in paper.rows if row not in measured]
        if absent:
            parts.append(f"Not measured: {', '.join(absent)}.")
        texts[name] = TableText("\n\n".join(filter(None, parts)), one.sentences)
    return texts


def effect_cells(effect: Effect | None) -> list[str]:
    """Return the cells of EFFECT_HEAD."""
    if effect is None:
        return [level_text(None)] * len(EFFECT_HEAD)
    over = interval_text(effect.over_clips), interval_text(effect.over_seeds)
    return [effect_text(effect.mean), *over]


def _scores(study: Study, paper: PaperTable, measured: dict[str, Setting]) -> TableText:
    """Return a table of J&F."""
    columns = _columns(study, paper)
    rows = [
        [plain(row), plain(setting.name), *_levels(study, paper, row, setting, columns)]
        for row, setting in measured.items()
    ]
    levels = markdown_table(["row", "run", *columns], rows, 2)
    base = measured.get(paper.reference or "")
    if base is None:
        return TableText(levels, [])
    lines, sentences = [], []
    for row, setting in measured.items():
        if row == paper.reference:
            continue
        for column in (ALL, *(c for c in columns if c != ALL)):
            sample = study.sample(column)
            effect = None if sample is None else study.effect(setting, base, sample)
            if effect is None:
                continue
            papers = _paper_effect(paper, row, column)
            lines.append([plain(row), column, *effect_cells(effect), effect_text(papers, 1)])
            if column == ALL:
                sentences.append(effect_sentence(row, effect, str(paper.reference), "J&F", papers))
    head = ["row", "benchmark", *EFFECT_HEAD, "paper"]
    effects = markdown_table(head, lines, 2)
    order = _order(study, paper, measured)
    intro = f"Effects against “{plain(paper.reference)}”:"
    return TableText("\n\n".join([levels, intro, effects]), sentences + ([order] if order else []))


def _columns(study: Study, paper: PaperTable) -> list[str]:
    """Return the paper's columns that the study has, then the study's others."""
    columns = [c for c in paper.columns if study.sample(c) is not None]
    return columns + [c for c in study.columns() if c not in columns]


def _levels(
    study: Study,
    paper: PaperTable,
    row: str,
    setting: Setting,
    columns: list[str],
    values: Values | None = None,
) -> list[str]:
    """Return a row's levels, with the paper's in parentheses.

    Args:
        values: The figure; None: J&F.
    """
    papers = dict(zip(paper.columns, paper.rows[row], strict=True))
    cells = []
    for column in columns:
        sample = study.sample(column)
        ours = level_text(None if sample is None else study.level(setting, sample, values))
        cells.append(f"{ours} ({papers[column]:.1f})" if column in papers else ours)
    return cells


def _paper_effect(paper: PaperTable, row: str, column: str) -> float | None:
    """Return the paper's effect in a column; for `all`, the mean over the table's columns."""
    differences = np.subtract(paper.rows[row], paper.rows[str(paper.reference)])
    if column == ALL:
        return float(differences.mean())
    return float(differences[paper.columns.index(column)]) if column in paper.columns else None


def _order(study: Study, paper: PaperTable, measured: dict[str, Setting]) -> str:
    sample = study.sample(ALL)
    if sample is None:
        return ""
    known = {row: study.level(setting, sample) for row, setting in measured.items()}
    levels = {row: level for row, level in known.items() if level is not None}
    shown = []
    for one, other in itertools.combinations(levels, 2):
        effect = study.effect(measured[other], measured[one], sample)
        if effect is not None and effect.is_shown:
            shown.append((one, other) if effect.mean > 0 else (other, one))
    return order_sentence(levels, {row: float(np.mean(paper.rows[row])) for row in levels}, shown)


def _figures(study: Study, paper: PaperTable, measured: dict[str, Setting]) -> TableText:
    """Return a table whose rows are figures of one setting (Tables 13 and 14)."""
    columns = _columns(study, paper)
    rows = []
    for row, setting in measured.items():
        values = figure_of(paper.metrics[row])
        cells = _levels(study, paper, row, setting, columns, values)
        rows.append([plain(row), plain(setting.name), *cells])
    markdown = markdown_table(["row", "run", *columns], rows, 2)
    by_metric = {paper.metrics[row]: row for row in measured}
    sample = study.sample(ALL)
    if not by_metric.keys() >= set(_AREA) or sample is None:
        return TableText(markdown, [])
    before, after = (by_metric[metric] for metric in _AREA)
    effect = study.effect(
        measured[after], measured[before], sample, figure_of(_AREA[1]), figure_of(_AREA[0])
    )
    if effect is None:
        return TableText(markdown, [])
    papers_change = float(np.mean(np.subtract(paper.rows[after], paper.rows[before])))
    sentence = effect_sentence(after, effect, before, "percentage points", papers_change)
    return TableText(markdown, [sentence])
