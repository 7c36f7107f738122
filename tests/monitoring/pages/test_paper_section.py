"""A run's results beside the paper's tables: values, effects, and what is missing."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rcot_rl.monitoring.pages.paper_section import paper_section
from rcot_rl.monitoring.pages.report import write_report
from rcot_rl.stats.benchmark_means import SUBSET_MEANS
from rcot_rl.stats.paper_tables import SCORE, paper_tables

PAPER = Path(__file__).parents[2] / "rcot_rl" / "stats" / "paper_tables.yaml"


def result(dataset: str, values: dict[str, list[float]], split: str = "valid") -> dict[str, Any]:
    """Return a benchmark's result with J = F; expressions of a video are neighbours in pairs."""
    subsets = SUBSET_MEANS.get(dataset, ("single_target",))
    checkpoints = {}
    for name, scores in values.items():
        rows = [
            {
                "video": f"v{i // 2}",
                "expression_id": str(i),
                "subset": subsets[i % len(subsets)],
                "J": score,
                "F": score,
                "J&F": score,
            }
            for i, score in enumerate(scores)
        ]
        means = {s: float(np.mean([r["J&F"] for r in rows if r["subset"] == s])) for s in subsets}
        checkpoints[name] = {
            "benchmark": dataset,
            "per_expression": rows,
            "per_subset": {s: {SCORE: mean} for s, mean in means.items()},
            SCORE: float(np.mean(list(means.values()))),
            "box_iou": 12.5,
        }
    return {"benchmark": dataset, "split": split, "checkpoints": checkpoints}


def cells(page: str) -> list[list[str]]:
    """Return the text of the cells of each row."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    parts = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
    return [[" ".join(re.sub("<[^>]+>", " ", p).split()) for p in row] for row in parts]


def test_rows_stand_beside_the_papers_with_effects_of_both() -> None:
    full, none = [50.0, 60.0, 70.0, 80.0], [48.0, 60.0, 65.0, 79.0]
    scores = {"mevis": result("mevis", {"g": full, "g@none": none})}
    wanted = {"table-3": {"first frame": "g@none", "VDG + KFG + AKS": "g"}}
    page = paper_section(wanted, scores)
    rows = {row[0]: row for row in cells(page)}
    assert rows["row of the paper"][2:] == ["ref-youtube-vos", "mevis valid", "revos", "reasonvos"]
    assert rows["first frame"][1] == "g@none"
    # paired over clips: -1 and -3, so -2 +- 12.706 * sqrt(2) / sqrt(2)
    mevis = rows["first frame"][3]
    assert mevis.startswith("63.0 [") and "paper 48.9" in mevis
    assert mevis.endswith("effect -2.0 [-14.7, +10.7], paper -4.8")
    assert (
        rows["VDG + KFG + AKS"][3].startswith("65.0 [")
        and "effect" not in (rows["VDG + KFG + AKS"][3])
    )
    assert rows["VDG"][1] == "–" and rows["VDG"][3] == "– paper 49.8 effect –, paper -3.9"
    assert "Missing: results on reasonvos, ref-youtube-vos, revos" in page
    assert "toy corpora" in page and "not comparable" in page


def test_subset_columns_take_the_subsets_expressions() -> None:
    full, other = [10.0, 20.0, 30.0, 40.0], [12.0, 20.0, 36.0, 40.0]
    scores = {"revos": result("revos", {"grpo": full, "grpo@separated": other})}
    wanted = {"table-6": {"separated": "grpo@separated", "unified": "grpo"}}
    rows = {row[0]: row for row in cells(paper_section(wanted, scores))}
    referring, reasoning = rows["separated"][2:]
    assert referring.startswith("24.0 [") and "effect +4.0 [-21.4, +29.4], paper -1.8" in referring
    assert reasoning.startswith("30.0 [") and "effect +0.0 [+0.0, +0.0], paper -2.6" in reasoning


def test_other_metrics_and_several_splits_have_their_own_columns() -> None:
    scores = {
        "davis17-valid": result("davis17", {"last": [5.0, 6.0]}),
        "davis17-train": result("davis17", {"last": [7.0, 8.0]}, split="train"),
    }
    wanted = {"table-14": {"average IoU": "last"}}
    head, row = cells(paper_section(wanted, scores))
    assert head[2:4] == ["davis17 valid", "davis17 train"]
    assert row[2] == row[3] == "12.5 paper 75.0"


@pytest.mark.parametrize("wanted", [None, {}, {"table-99": {"x": "y"}}, {"table-3": 5}, "table-3"])
def test_a_run_without_tables_has_no_section(wanted: object) -> None:
    assert paper_section(wanted, {}) == ""


def test_hostile_results_are_shown_as_missing() -> None:
    wanted = {"table-3": {"VDG": "<b>x", "first frame": None}}
    good = result("mevis", {"<b>x": [50.0, 60.0]})
    for damage in (None, [], {"benchmark": "mevis", "checkpoints": [1]}, {"benchmark": {}}):
        page = paper_section(wanted, {"mevis": damage})
        assert "<b>x" not in page and "paper 49.8" in page
    broken = copy.deepcopy(good)
    broken["checkpoints"]["<b>x"][SCORE] = float("nan")
    assert "nan" not in paper_section(wanted, {"mevis": broken})


def test_the_report_page_has_the_section(make_run: Callable[..., Path]) -> None:
    run = make_run()
    record = yaml.safe_load((run / "recipe.yaml").read_text())
    checkpoints = {"explicit CoT": "grpo-ktg", "answer only": "sft"}
    record["recipe"]["report"] = {"paper_tables": {"table-15": checkpoints}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(record))
    page = write_report(run).read_text()
    (file,) = (run / "eval").glob("reasonvos*.json")
    scored = json.loads(file.read_text())["checkpoints"]
    rows = {row[0]: row for row in cells(page[page.index("Beside the paper") :])}
    assert rows["explicit CoT"][4].startswith(f"{scored['grpo-ktg']['J&F']:.1f} [")
    change = scored["sft"]["J&F"] - scored["grpo-ktg"]["J&F"]
    assert f"effect {change:+.1f} [" in rows["answer only"][4]


def test_the_papers_tables_are_consistent() -> None:
    tables = paper_tables()
    assert [len(t.rows) for t in tables.values()] == [1, 1, 5, 6, 6, 2, 2, 2, 2, 3, 1, 2]
    for table in tables.values():
        assert all(len(values) == len(table.columns) for values in table.rows.values())
        assert set(table.metrics) <= set(table.rows)
        assert table.reference is None or table.reference in table.rows

    def cell(table: str, row: str, column: str) -> float:
        return tables[table].rows[row][tables[table].columns.index(column)]

    # the same experiment occurs in several tables of the paper
    final = {"table-1": "RCoT-Seg-3B", "table-2": "RCoT-Seg", "table-3": "VDG + KFG + AKS"}
    final |= {"table-4": "λ=5", "table-5": "SFT(A,G) + GRPO(A,G)", "table-6": "unified"}
    final |= {"table-8": "Ours-3B", "table-9": "Ours-3B", "table-10": "full video"}
    final |= {"table-15": "explicit CoT"}
    for column in ("davis17", "ref-youtube-vos", "mevis", "revos", "reasonvos", "revos/reasoning"):
        values = {cell(t, r, column) for t, r in final.items() if column in tables[t].columns}
        assert len(values) == 1, column
    for column in tables["table-3"].columns:
        assert cell("table-3", "VDG + KFG", column) == cell("table-4", "λ=0", column)
