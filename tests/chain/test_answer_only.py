"""The answer-only ablation on the real stack: shards and SFT without reasoning (Table 15)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rcot_rl.protocol.parser import answer_only_faults
from rcot_rl.recipe.loader import RECIPES

pytestmark = pytest.mark.slow


def test_sft_learns_answers_without_reasoning(
    small: list[str], run_rcot: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = RECIPES.folder / "ablations" / "table15.yaml"
    overrides = [*small, "data.describe=template", "train.sft.epochs=1", "stages=[data, sft]"]
    done = run_rcot("run", recipe, "extends=laptop", *overrides, "--out", run)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = pq.ParquetFile(next((run / "shards" / "sft-384").glob("train-*.parquet"))).read(
        columns=["messages", "prompt"]
    )
    for row in rows.to_pylist():
        assert answer_only_faults(row["messages"][1]["content"]) == ()
        assert "think" not in row["prompt"][0]["content"]
    steps = [json.loads(line) for line in (run / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == (64 + 192) // 16
    losses = [step["train/loss"] for step in steps]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert json.loads((run / "sft" / "model" / "rcot.json").read_text())["response"] == "answer"
