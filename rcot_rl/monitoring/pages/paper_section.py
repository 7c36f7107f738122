"""The report's section that sets a run's results beside the paper's tables.

Levels of toy corpora and tiny models are not comparable with the paper's. What can be compared is
the effect: the difference of a row from the table's reference row, in the run and in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from rcot_rl.monitoring.pages.figures import DASH, number, score_interval
from rcot_rl.monitoring.pages.page import missing, section, table, text
from rcot_rl.stats.expression_scores import Expressions, by_expression, level, paired_change
from rcot_rl.stats.intervals import Interval
from rcot_rl.stats.json_values import at, is_number
from rcot_rl.stats.paper_tables import SCORE, PaperTable, paper_tables

_EXPLANATION = (
    "J&amp;F and other figures are in percent. Brackets: 95 % confidence interval over this run’s "
    "clips. Effect: difference from the reference row, paired over clips in this run, and in the "
    "paper. The paper trains 3- and 7-billion-parameter models on the public corpora; levels of "
    "toy corpora, of tiny models or of a part of a benchmark are not comparable with its levels. "
    "At most the signs of the effects are."
)


class _Measured(NamedTuple):
    """A checkpoint's result in one column."""

    value: float | None = None
    interval: str = ""
    expressions: Expressions = MappingProxyType({})
    """Empty for another metric than J&F."""


def paper_section(wanted: Any, scores: Mapping[str, Any]) -> str:
    """Return the section; empty if the recipe names no table.

    Args:
        wanted: The recipe's `report.paper_tables`: table -> row -> checkpoint.
        scores: The parsed result file of each benchmark.
    """
    known = paper_tables()
    tables = wanted if isinstance(wanted, dict) else {}
    parts = [
        _table(name, known[name], rows, scores)
        for name, rows in tables.items()
        if name in known and isinstance(rows, dict)
    ]
    if not parts:
        return ""
    return section("Beside the paper", *parts, f'<p class="soft">{_EXPLANATION}</p>')


def _table(
    name: str, paper: PaperTable, checkpoints: Mapping[str, Any], scores: Mapping[str, Any]
) -> str:
    columns = [
        (number_of, column, result)
        for number_of, column in enumerate(paper.columns)
        for result in _results(scores, column) or [None]
    ]
    rows = []
    for row, values in paper.rows.items():
        checkpoint = checkpoints.get(row)
        cells = [text(row), text(checkpoint) if checkpoint else DASH]
        for k, column, result in columns:
            ours = _measured(result, checkpoint, column, paper.metrics.get(row, SCORE))
            base = _Measured()
            if paper.reference is not None and row != paper.reference:
                base = _measured(result, checkpoints.get(paper.reference), column, SCORE)
            effect = values[k] - paper.rows[paper.reference][k] if paper.reference else None
            cells.append(_cell(ours, base, values[k], effect if row != paper.reference else None))
        rows.append(cells)
    head = [
        "row of the paper",
        "this run",
        *(_head(column, result) for _, column, result in columns),
    ]
    absent = sorted({c for c in paper.columns if not _results(scores, c)})
    return (
        f"<h3>Table {text(name.removeprefix('table-'))}: {text(paper.title)}</h3>"
        + (f'<p class="soft">{text(paper.note)}</p>' if paper.note else "")
        + table(head, rows, 2)
        + (missing(f"results on {', '.join(absent)}") if absent else "")
    )


def _results(scores: Mapping[str, Any], column: str) -> list[Any]:
    """Return the results on a column's benchmark, one for each split."""
    dataset = column.partition("/")[0]
    return [result for result in scores.values() if at(result, "benchmark") == dataset]


def _head(column: str, result: Any) -> str:
    split = at(result, "split")
    return text(column) + (f"<small>{text(split, 40)}</small>" if split else "")


def _measured(result: Any, checkpoint: Any, column: str, metric: str) -> _Measured:
    scored = at(result, "checkpoints", str(checkpoint))
    subset = column.partition("/")[2]
    value = at(scored, "per_subset", subset, metric) if subset else at(scored, metric)
    if not is_number(value):
        return _Measured()
    expressions = by_expression(scored) if metric == SCORE else {}
    if subset:
        expressions = {key: one for key, one in expressions.items() if one.part == subset}
    interval = "" if subset else score_interval(scored, ".1f")
    return _Measured(float(value), interval or _brackets(level(expressions)), expressions)


def _cell(ours: _Measured, base: _Measured, paper: float, effect: float | None) -> str:
    """Return a cell: this run's value, the paper's, and the effect in both."""
    value = DASH
    if ours.value is not None:
        value = f"<b>{number(ours.value, 1)}</b> {ours.interval}"
    lines = [f"paper {number(paper, 1)}"]
    if effect is not None:
        shown = DASH
        change = paired_change(base.expressions, ours.expressions)
        if ours.value is not None and base.value is not None:
            shown = f"{ours.value - base.value:+.1f} {_brackets(change, '+')}".strip()
        lines.append(f"effect {shown}, paper {effect:+.1f}")
    return value.strip() + "".join(f"<small>{line}</small>" for line in lines)


def _brackets(interval: Interval | None, sign: str = "") -> str:
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f"[{interval.low:{sign}.1f}, {interval.high:{sign}.1f}]"
