"""The table of every expression is one line each and runs no formula in a spreadsheet."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from rcot_rl.evaluation.benchmarks import evaluate
from rcot_rl.evaluation.score_table import COLUMNS, score_table


def lines(results: dict) -> list[dict[str, str]]:
    text = score_table(results)
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == text.count("\n") - 1
    return rows


def test_each_expression_and_checkpoint_has_a_line_with_its_scores_and_faults(
    make_world, make_predictions
) -> None:
    world = make_world("mevis", n_videos=2)
    root, _ = make_predictions(world)
    trace = {"keyframe": 2, "initial_keyframe": 0, "rounds": 3, "boxes_source": []}
    (root / "clip-0/0/trace.json").write_text(json.dumps({**trace, "segmenter": "sam2"}))
    (root / "clip-0/1/trace.json").write_text("{")
    (root / "clip-1/3" / f"{world.frames[2]}.png").unlink()
    result = evaluate("mevis", world.root, world.split, root)
    rows = lines({"sft": result, "grpo": result})
    assert [(r["checkpoint"], r["video"], r["expression_id"]) for r in rows] == [
        (name, *pair) for name in ("sft", "grpo") for pair in world.pairs()
    ]
    assert tuple(rows[0]) == COLUMNS
    for row, scored in zip(rows, result["per_expression"], strict=False):
        for key in ("J", "F", "J&F"):
            assert float(row[key]) == pytest.approx(scored[key], abs=1e-6)
        assert (row["text"], row["subset"]) == (scored["expression"], scored["subset"])
    assert (rows[0]["keyframe"], rows[0]["aks_rounds"], rows[0]["box_iou"]) == ("2", "3", "0")
    assert rows[1]["keyframe"] == "" and "cannot be read" in rows[1]["faults"]
    assert rows[2]["faults"] == "" and rows[8]["faults"] == "1 frames without a usable mask"


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t=", "\r\n=", "\x00=", " =", "＝"])
def test_no_cell_is_a_formula_or_breaks_a_line(first: str, make_world, make_predictions) -> None:
    world = make_world("mevis", n_videos=1)
    evil = f"{first}cmd|' /C calc'!A0\n=1,\"2\u2028=3\x0b4"
    path = world.root / "valid_u" / "meta_expressions.json"
    path.write_text(path.read_text().replace('"object 1"', json.dumps(evil)))
    root, _ = make_predictions(world)
    rows = lines({evil: evaluate("mevis", world.root, world.split, root)})
    assert len(rows) == 5
    for cell in (rows[1]["text"], rows[1]["checkpoint"]):
        assert cell.startswith("'") and cell.isprintable()


def test_the_command_scores_several_folders_and_writes_the_table(
    make_world, make_predictions, tmp_path: Path, run_rcot
) -> None:
    world = make_world("mevis")
    good, _ = make_predictions(world)
    bad = shutil.copytree(good, good.with_name("bad"))
    shutil.rmtree(bad / "clip-0" / "0")
    place = ["--dataset", "mevis", "--corpus", world.root, "--split", world.split]
    table = tmp_path / "table.csv"
    done = run_rcot("eval", bad, good, *place, "--csv", table, "--workers", 2)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [r["checkpoint"] for r in rows] == [str(bad)] * 15 + [str(good)] * 15
    assert f"from {bad} to {good}" in done.stdout and "bootstrap over 3 videos" in done.stdout
    assert f"{bad}: 1 predictions are missing" in done.stdout

    document = json.loads(run_rcot("eval", bad, good, *place, "--json").stdout)
    alone = json.loads(run_rcot("eval", good, *place, "--json").stdout)
    assert document["checkpoints"][str(good)] == alone
    assert [(d["before"], d["after"]) for d in document["differences"]] == [(str(bad), str(good))]
