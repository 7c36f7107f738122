"""A GRPO stage with repeated faults completes, every step done once (real stack).

The harness and all of its faults are `benchmarks/bench_kills.py`'s; here run the quick ones of each
kind: a process that dies, one that dies while a checkpoint is written, a reward that hangs, a disk
that is full.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.drill

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench_kills.py"
FAULTS = ["trainer rank, mid-step", "driver, mid-save", "hung reward", "full disk"]


def test_a_stage_hit_by_faults_completes_every_step_once(tmp_path):
    table = tmp_path / "table.json"
    done = subprocess.run(
        [sys.executable, BENCH, "--only", "; ".join(FAULTS), "--json", table],
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(table.read_text())
    expected = [f for f in FAULTS if f != "full disk" or "is left out" not in done.stderr]
    assert [row["fault"] for row in result["faults"]] == expected
    assert result["steps"] == list(range(1, 3 * len(expected) + 3))
    for row in result["faults"]:
        assert bool(row["causes"]) == (row["fault"] != "hung reward"), row
