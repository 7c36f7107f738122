"""A CSV table of the scores of every expression and method, for spreadsheets.

Queries and ids come from datasets and predictions. A spreadsheet runs a cell that starts with `=`,
`+`, `-` or `@` as a formula, so such texts get a leading apostrophe. Line breaks and other control
characters become spaces: each expression has exactly one line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

COLUMNS = (
    "checkpoint",
    "video",
    "expression_id",
    "text",
    "subset",
    "J",
    "F",
    "J&F",
    "keyframe",
    "aks_rounds",
    "box_iou",
    "faults",
)
_FORMULA = tuple("=+-@＝＋－＠")


def score_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return CSV with a header and one line for each expression and method.

    Args:
        results: Checkpoint or baseline -> its result. Scores are in percent.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, result in results.items():
        for row in result["per_expression"]:
            texts = (name, row["video"], row["expression_id"], row["expression"], row["subset"])
            figures = (row.get(column) for column in COLUMNS[5:-1])
            writer.writerow([*map(_text, texts), *map(_number, figures), _text(faults(row))])
    return out.getvalue()


def faults(row: Mapping[str, Any]) -> str:
    """Return what is wrong with an expression's predictions and ground truth; "" if nothing."""
    kinds = (
        (row["n_unusable_frames"], f"{row['n_unusable_frames']} frames without a usable mask"),
        (row["n_frames_without_truth"], f"{row['n_frames_without_truth']} without ground truth"),
        (row["defective"], "defective ground truth"),
        (row["unexpected"], "unexpected names or values"),
        (row.get("trace_fault"), f"trace.json: {row.get('trace_fault')}"),
    )
    return "; ".join(text for present, text in kinds if present)


def _text(value: str) -> str:
    """Return a cell without control characters that no spreadsheet runs as a formula."""
    line = " ".join("".join(c if c.isprintable() else " " for c in value).split())
    return f"'{line}" if line.startswith(_FORMULA) else line


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"
