"""The paper's results, from paper_tables.yaml: what a run of an ablation is set beside."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml
from pydantic import Field

from rcot_rl.recipe.base import Section

FILE = Path(__file__).with_name("paper_tables.yaml")
SCORE = "J&F"
"""The metric of rows that `metrics` does not list."""


class PaperTable(Section):
    """One table of the paper."""

    title: str
    columns: list[str]
    """Benchmarks, or a benchmark and its subset: `revos/referring`."""
    rows: dict[str, list[float]]
    """Values of the columns by the row's name."""
    metrics: dict[str, str] = Field(default_factory=dict)
    """Row -> key of its metric in the results of an evaluation. Other rows: J&F."""
    reference: str | None = None
    """Row that the others are compared with."""
    note: str = ""
    """What is uncertain about the table."""


@cache
def paper_tables() -> Mapping[str, PaperTable]:
    """Return the tables by name: `table-3`."""
    tables = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {name: PaperTable.model_validate(table) for name, table in tables.items()}
