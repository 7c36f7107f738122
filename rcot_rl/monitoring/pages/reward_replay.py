"""`rcot score replay`: rescore a run's dumped rollouts under other rewards, without training.

For each reward: mean, standard deviation, standard deviation within groups, share of groups without
variance, and mean absolute advantage (eq. 14, in the groups of the rollouts). For each reward
against the first: Kendall's tau within groups, share of advantages that change sign, and share of
groups with a different best response. One step is in memory at a time.

A replay cannot tell what a policy trained under the other reward would have answered.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.monitoring.pages.replay_page import replay_page
from rcot_rl.stats.rollout_rows import NO_SPREAD, last_turns
from rcot_rl.system.files import write_text
from reward_fns.score import Reward

MOST_MOVED = 12
"""Number of responses that are kept per reward, those whose advantage changes most."""

NEEDED = ("prompt_id", "response", "ground_truth")
"""Keys that each row of a rollout dump must have."""


@dataclass
class Moved:
    """A response whose advantage changes; every mapping is by the reward's spec."""

    change: float
    step: int
    row: dict[str, Any]
    rewards: dict[str, float]
    advantages: dict[str, float]
    reasons: dict[str, list[str]]


@dataclass
class Replay:
    """Result of `replay`; every mapping is by the reward's spec."""

    stage: str
    names: list[str]
    n_responses: int = 0
    n_groups: int = 0
    steps: list[int] = field(default_factory=list)
    by_step: dict[str, list[float]] = field(default_factory=dict)
    """Mean reward of each step."""
    totals: dict[str, dict[str, float]] = field(default_factory=dict)
    against_first: dict[str, dict[str, float]] = field(default_factory=dict)
    dumped: dict[str, float] = field(default_factory=dict)
    """Largest difference from the rewards that the run logged."""
    moved: dict[str, list[Moved]] = field(default_factory=dict)


def replay(run: Path, stage: str, rewards: Mapping[str, Reward]) -> Replay:
    """Rescore RUN/<stage>/rollouts. Raises InputError.

    Args:
        rewards: Spec -> reward; the others are compared with the first.
    """
    names = list(rewards)
    result = Replay(stage, names)
    sums: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    pairs: dict[str, dict[str, list[float]]] = {name: {} for name in names[1:]}
    heaps: dict[str, list[tuple[float, int, Moved]]] = {name: [] for name in names[1:]}
    for step, rows in _dumped_steps(run, stage):
        scores = {n: [_score(rewards[n], row) for row in rows] for n in names}
        values = {n: np.array([s.reward for s in scores[n]]) for n in names}
        groups = _groups(rows)
        advantages = {n: advantages_of(values[n], groups) for n in names}
        result.steps.append(step)
        result.n_responses += len(rows)
        result.n_groups += len(groups)
        for name in names:
            result.by_step.setdefault(name, []).append(float(values[name].mean()))
            _add(sums[name], _single_stats(values[name], advantages[name], groups))
            if rows and "reward" in rows[0]:
                logged = np.array([float(row["reward"]) for row in rows])
                gap = float(np.abs(logged - values[name]).max())
                result.dumped[name] = max(result.dumped.get(name, 0.0), gap)
        for name in names[1:]:
            _add(pairs[name], _paired_stats(values, advantages, groups, names[0], name))
            change = np.abs(advantages[name] - advantages[names[0]])
            for i in np.argsort(-change)[:MOST_MOVED]:
                moved = Moved(
                    float(change[i]),
                    step,
                    rows[i],
                    {n: float(values[n][i]) for n in names},
                    {n: float(advantages[n][i]) for n in names},
                    {n: list(scores[n][i].reasons) for n in names},
                )
                heapq.heappush(heaps[name], (moved.change, result.n_responses + int(i), moved))
                if len(heaps[name]) > MOST_MOVED:
                    heapq.heappop(heaps[name])
    for name in names:
        result.totals[name] = {k: float(np.mean(v)) for k, v in sums[name].items()}
    for name in names[1:]:
        result.against_first[name] = {k: float(np.mean(v)) for k, v in pairs[name].items() if v}
        result.moved[name] = [m for *_, m in sorted(heaps[name], key=lambda x: -x[0])]
    return result


def advantages_of(rewards: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """Return the advantages of eq. 14 as the trainer computes them.

    They are (r - mean) / (std + 1e-6) with the unbiased std; a group of one has advantage 0, as in
    verl.

    Args:
        rewards: float [N].
        groups: Positions of the members of each group.
    """
    out = np.zeros_like(rewards, dtype=float)
    for group in groups:
        if len(group) > 1:
            part = rewards[group]
            out[group] = (part - part.mean()) / (part.std(ddof=1) + 1e-6)
    return out


def replay_text(result: Replay) -> str:
    """Return the tables for the terminal."""
    first = result.names[0]
    width = max(24, *(len(name) + 2 for name in result.names))
    lines = [
        f"{result.stage}: {result.n_responses} responses in {result.n_groups} groups, "
        f"{len(result.steps)} steps",
        f"{'reward':<{width}}{'mean':>8}{'std':>8}{'in group':>10}{'dead':>7}{'|adv|':>8}",
    ]
    for name in result.names:
        t = result.totals[name]
        lines.append(
            f"{name:<{width}}{t['mean']:>8.3f}{t['std']:>8.3f}{t['group_std']:>10.3f}"
            f"{t['zero_variance']:>7.2f}{t['advantage']:>8.3f}"
        )
    lines.append(f"against {first}:")
    for name, p in result.against_first.items():
        tau = f"{p['kendall_tau']:.3f}" if "kendall_tau" in p else "–"
        lines.append(
            f"{name:<{width}} Kendall's tau within groups {tau}, sign flips "
            f"{p['sign_flips']:.3f}, groups with a different best {p['other_best']:.3f}"
        )
    if first in result.dumped:
        gap = result.dumped[first]
        agrees = "equals" if gap < 1e-6 else f"differs by up to {gap:.3g} from"
        lines.append(f"{first} {agrees} the rewards logged by the run")
    return "\n".join(lines)


def write_replay(run: Path, result: Replay, out: Path) -> Path:
    """Write OUT/replay.json and OUT/replay.html and return the path of the page."""
    write_text(out / "replay.json", json.dumps(asdict(result), ensure_ascii=False, indent=1) + "\n")
    write_text(out / "replay.html", replay_page(run, result))
    return out / "replay.html"


def _dumped_steps(run: Path, stage: str) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield the step and its last turns, in the order of steps."""
    folder = run / stage / "rollouts"
    files = [p for p in folder.glob("*.jsonl") if p.stem.isdigit()]
    if not files:
        raise InputError("no rollouts (STEP.jsonl) in this folder", file=folder)
    for path in sorted(files, key=lambda p: int(p.stem)):
        rows = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"not valid JSON: {error}", file=path, line=number) from error
            for key in NEEDED:
                if not isinstance(row, dict) or key not in row:
                    raise InputError("missing", file=path, line=number, key=key)
            rows.append(row)
        if not rows:
            raise InputError("empty file; expected one response per line", file=path)
        yield int(path.stem), last_turns(rows, "prompt_id")


def _score(reward: Reward, row: dict[str, Any]) -> Any:
    skip = {*NEEDED, "reward", "components", "reasons"}
    rest = {key: value for key, value in row.items() if key not in skip}
    return reward.score(row["response"], row["ground_truth"], **rest)


def _groups(rows: list[dict[str, Any]]) -> list[np.ndarray]:
    """Return the positions of each prompt's responses."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row["prompt_id"], []).append(i)
    return [np.array(members) for members in groups.values()]


def _add(sums: dict[str, list[float]], new: Mapping[str, list[float]]) -> None:
    for key, values in new.items():
        sums.setdefault(key, []).extend(values)


def _single_stats(
    values: np.ndarray, advantages: np.ndarray, groups: list[np.ndarray]
) -> dict[str, list[float]]:
    spreads = [float(values[g].std()) for g in groups]
    return {
        "mean": values.tolist(),
        "std": [float(values.std())],
        "group_std": spreads,
        "zero_variance": [float(s < NO_SPREAD) for s in spreads],
        "advantage": np.abs(advantages).tolist(),
    }


def _paired_stats(
    values: Mapping[str, np.ndarray],
    advantages: Mapping[str, np.ndarray],
    groups: list[np.ndarray],
    first: str,
    other: str,
) -> dict[str, list[float]]:
    flips = (advantages[first] * advantages[other] < 0).astype(float).tolist()
    taus, best = [], []
    for group in groups:
        a, b = values[first][group], values[other][group]
        tau = kendall_tau(a, b)
        if tau is not None:
            taus.append(tau)
        # Different: no response is best under both rewards.
        best.append(float(not ((a == a.max()) & (b == b.max())).any()))
    return {"sign_flips": flips, "kendall_tau": taus, "other_best": best}


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return tau-b of two short lists; None if all values of one list are equal."""
    pairs = list(combinations(range(len(a)), 2))
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in pairs]
    ordered = [sum(s[k] != 0 for s in signs) for k in (0, 1)]
    if not all(ordered):
        return None
    return float(sum(x * y for x, y in signs) / np.sqrt(ordered[0] * ordered[1]))
