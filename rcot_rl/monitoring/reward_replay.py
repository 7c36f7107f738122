"""`rcot score replay`: a run's dumped rollouts under other rewards, without training again.

For each reward: mean and spread, the spread within groups, how many groups teach nothing, and the
size of the advantages (eq. 14, in the groups that were rolled out). Between the first reward and
each other: how the order within groups changes (Kendall's tau), how often an advantage changes its
sign, and how often another response of the group comes out best. One step is held at a time.

What it cannot say: what a policy trained under the other reward would have answered.
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
from rcot_rl.files import write_text
from rcot_rl.monitoring.replay_page import replay_page
from reward_fns.score import Reward

MOST_MOVED = 12
NEEDED = ("prompt_id", "response", "ground_truth")


@dataclass
class Moved:
    """A response whose advantage changed much."""

    change: float
    step: int
    row: dict[str, Any]
    rewards: dict[str, float]
    advantages: dict[str, float]
    reasons: dict[str, list[str]]


@dataclass
class Replay:
    """What `replay` found; every mapping is by the reward's spec."""

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
    """Largest difference between a reward and what the run had noted."""
    moved: dict[str, list[Moved]] = field(default_factory=dict)


def replay(run: Path, stage: str, rewards: Mapping[str, Reward]) -> Replay:
    """Rescore RUN/<stage>/rollouts under `rewards` (spec -> reward, the first is compared with).

    Raises InputError, with file and line, for rollouts that are missing or cut off.
    """
    names = list(rewards)
    found = Replay(stage, names)
    sums: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    pairs: dict[str, dict[str, list[float]]] = {name: {} for name in names[1:]}
    heaps: dict[str, list[tuple[float, int, Moved]]] = {name: [] for name in names[1:]}
    for step, rows in _steps(run, stage):
        scores = {n: [_score(rewards[n], row) for row in rows] for n in names}
        values = {n: np.array([s.reward for s in scores[n]]) for n in names}
        groups = _groups(rows)
        advantages = {n: advantages_of(values[n], groups) for n in names}
        found.steps.append(step)
        found.n_responses += len(rows)
        found.n_groups += len(groups)
        for name in names:
            found.by_step.setdefault(name, []).append(float(values[name].mean()))
            _add(sums[name], _of_one(values[name], advantages[name], groups))
            if rows and "reward" in rows[0]:
                noted = np.array([float(row["reward"]) for row in rows])
                gap = float(np.abs(noted - values[name]).max())
                found.dumped[name] = max(found.dumped.get(name, 0.0), gap)
        for name in names[1:]:
            _add(pairs[name], _of_two(values, advantages, groups, names[0], name))
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
                heapq.heappush(heaps[name], (moved.change, found.n_responses + int(i), moved))
                if len(heaps[name]) > MOST_MOVED:
                    heapq.heappop(heaps[name])
    for name in names:
        found.totals[name] = {k: float(np.mean(v)) for k, v in sums[name].items()}
    for name in names[1:]:
        found.against_first[name] = {k: float(np.mean(v)) for k, v in pairs[name].items() if v}
        found.moved[name] = [m for *_, m in sorted(heaps[name], key=lambda x: -x[0])]
    return found


def advantages_of(rewards: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """Equation 14 as the trainer computes it: (r - mean) / (std + 1e-6), std unbiased.

    rewards: [N]; groups: the members' positions. A group of one has advantage 0, as in verl.
    """
    out = np.zeros_like(rewards, dtype=float)
    for group in groups:
        if len(group) > 1:
            part = rewards[group]
            out[group] = (part - part.mean()) / (part.std(ddof=1) + 1e-6)
    return out


def replay_text(found: Replay) -> str:
    """The tables for the terminal."""
    first = found.names[0]
    width = max(24, *(len(name) + 2 for name in found.names))
    lines = [
        f"{found.stage}: {found.n_responses} responses in {found.n_groups} groups, "
        f"{len(found.steps)} steps",
        f"{'reward':<{width}}{'mean':>8}{'std':>8}{'in group':>10}{'dead':>7}{'|adv|':>8}",
    ]
    for name in found.names:
        t = found.totals[name]
        lines.append(
            f"{name:<{width}}{t['mean']:>8.3f}{t['std']:>8.3f}{t['group_std']:>10.3f}"
            f"{t['zero_variance']:>7.2f}{t['advantage']:>8.3f}"
        )
    lines.append(f"against {first}:")
    for name, p in found.against_first.items():
        tau = f"{p['kendall_tau']:.3f}" if "kendall_tau" in p else "–"
        lines.append(
            f"{name:<{width}} Kendall tau in groups {tau}, signs that flip "
            f"{p['sign_flips']:.3f}, groups with another best {p['other_best']:.3f}"
        )
    if first in found.dumped:
        gap = found.dumped[first]
        same = "equals what the run noted" if gap < 1e-6 else f"differs from the run's by {gap:.3g}"
        lines.append(f"{first} {same}")
    return "\n".join(lines)


def write_replay(run: Path, found: Replay, out: Path) -> Path:
    """Write OUT/replay.json and OUT/replay.html; returns the page."""
    write_text(out / "replay.json", json.dumps(asdict(found), ensure_ascii=False, indent=1) + "\n")
    write_text(out / "replay.html", replay_page(run, found))
    return out / "replay.html"


def _steps(run: Path, stage: str) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    folder = run / stage / "rollouts"
    files = [p for p in folder.glob("*.jsonl") if p.stem.isdigit()]
    if not files:
        raise InputError("holds no rollouts", file=folder)
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
            raise InputError("is empty", file=path)
        yield int(path.stem), _last_turns(rows)


def _last_turns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a response of several turns the last alone, which has its reward."""
    last: dict[Any, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        turned = "turn" in row and "sample" in row
        key = (row["prompt_id"], row["sample"]) if turned else number
        if key not in last or row["turn"] >= last[key]["turn"]:
            last[key] = row
    return list(last.values())


def _score(reward: Reward, row: dict[str, Any]) -> Any:
    skip = {*NEEDED, "reward", "components", "reasons"}
    rest = {key: value for key, value in row.items() if key not in skip}
    return reward.score(row["response"], row["ground_truth"], **rest)


def _groups(rows: list[dict[str, Any]]) -> list[np.ndarray]:
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row["prompt_id"], []).append(i)
    return [np.array(members) for members in groups.values()]


def _add(sums: dict[str, list[float]], new: Mapping[str, list[float]]) -> None:
    for key, values in new.items():
        sums.setdefault(key, []).extend(values)


def _of_one(
    values: np.ndarray, advantages: np.ndarray, groups: list[np.ndarray]
) -> dict[str, list[float]]:
    spreads = [float(values[g].std()) for g in groups]
    return {
        "mean": values.tolist(),
        "std": [float(values.std())],
        "group_std": spreads,
        "zero_variance": [float(s < 1e-8) for s in spreads],
        "advantage": np.abs(advantages).tolist(),
    }


def _of_two(
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
        # another best: none of the first reward's best is among the other's
        best.append(float(not ((a == a.max()) & (b == b.max())).any()))
    return {"sign_flips": flips, "kendall_tau": taus, "other_best": best}


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float | None:
    """Tau-b of two short lists; None where one of them has no order at all."""
    pairs = list(combinations(range(len(a)), 2))
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in pairs]
    ordered = [sum(s[k] != 0 for s in signs) for k in (0, 1)]
    if not all(ordered):
        return None
    return float(sum(x * y for x, y in signs) / np.sqrt(ordered[0] * ordered[1]))
