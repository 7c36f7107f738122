"""Made-up results of a study: two benchmarks, several recipes and seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rcot_rl.monitoring.study.study_results import StudyResults

TABLES = {
    "table-5": {"base": "base", "SFT(A,G)": "sft", "SFT(A,G) + GRPO(A,G)": "last"},
    "table-13": {"initial area ratio": "last", "area ratio after AKS": "last"},
    "table-15": {"explicit CoT": "last"},
}
GAINS = {"base": -30.0, "sft": -6.0, "last": 0.0}
SUBSETS = {"revos": ("referring", "reasoning", "no_target"), "mevis": ("multi_target",)}


def benchmark(dataset: str, n_clips: int, per_clip: int) -> dict[str, Any]:
    subsets = SUBSETS[dataset]
    n = n_clips * per_clip
    return {
        "dataset": dataset,
        "split": "valid",
        "clips": [f"{dataset}/clip-{k}" for k in range(n_clips)],
        "clip": [k // per_clip for k in range(n)],
        "id": [str(k % per_clip) for k in range(n)],
        "subset": [subsets[k % len(subsets)] for k in range(n)],
        "kind": [("time", "attribute")[k % 2] for k in range(n)],
    }


def scores(rng: np.random.Generator, n: int, gain: float, absent: bool) -> dict[str, Any]:
    def values() -> list[float]:
        return [round(float(v), 2) for v in np.clip(rng.normal(60 + gain, 8, n), 0, 100)]

    cell: dict[str, Any] = {"J": values(), "F": values()}
    if absent:
        cell["empty"] = [int(v) for v in rng.integers(0, 2, n)]
        cell["found"] = [1 - v for v in cell["empty"]]
    return cell


def heldout(rng: np.random.Generator, mean: float) -> dict[str, Any]:
    per_prompt = [round(float(v), 4) for v in rng.normal(mean, 0.3, 24)]
    components = {"format": 0.9, "accuracy": round(mean / 2, 4)}
    return {w: {"per_prompt": per_prompt, "components": components} for w in ("sampled", "greedy")}


def made_up(seeds: tuple[int, ...] = (1, 2, 3), n_clips: int = 9) -> dict[str, Any]:
    """Return results.json as JSON values."""
    benchmarks = {f"{d}-valid": benchmark(d, n_clips, 4) for d in SUBSETS}
    runs = []
    recipes = {
        "training": (GAINS, TABLES, False),
        "answer_only": ({"last": -3.0}, {"table-15": {"answer only": "last"}}, False),
        "zero_target": ({"last": 1.0}, {}, True),
    }
    for number, (recipe, (gains, tables, zero_target)) in enumerate(recipes.items()):
        for seed in seeds:
            rng = np.random.default_rng([seed, number])
            by_benchmark = {}
            for name, one in benchmarks.items():
                n, absent = len(one["clip"]), one["dataset"] == "revos"
                cells = {cell: scores(rng, n, gain, absent) for cell, gain in gains.items()}
                if "table-13" in tables:
                    area = rng.uniform(20, 60, n).round(2)
                    cells["last"]["figures"] = {
                        "keyframe_area_ratio_initial": [None, *map(float, area[1:])],
                        "keyframe_area_ratio": [float(v) for v in area + 5],
                    }
                by_benchmark[name] = cells
            start = "sft" if "sft" in gains else "last"
            runs.append(
                {
                    "recipe": recipe,
                    "seed": seed,
                    "commit": "feedc0ffee",
                    "command": f"rcot run {recipe}.yaml seed={seed}",
                    "versions": {"verl": "0.9.1"},
                    "minutes": {"data": 0.5, "grpo": 4.0 + seed},
                    "steps": {"grpo": 24},
                    "start": start,
                    "final": "last",
                    "zero_target": zero_target,
                    "paper_tables": tables,
                    "scores": by_benchmark,
                    "rewards": {
                        "ktg": {c: heldout(rng, 3 + gains[c] / 30) for c in {start: 0, "last": 0}}
                    },
                }
            )
    return {"format": 1, "benchmarks": benchmarks, "runs": runs}


@pytest.fixture
def study_values() -> Callable[..., dict[str, Any]]:
    """Return a function that makes results.json as JSON values."""
    return made_up


@pytest.fixture
def study_results() -> Callable[..., StudyResults]:
    """Return a function that makes the results."""
    return lambda *args, **options: StudyResults.model_validate(made_up(*args, **options))
