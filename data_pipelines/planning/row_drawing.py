"""Draw rows from pools of candidates: disjoint sets of exact size and ratio.

Handles the quotas of groups, the corpora's shares, the cap per video, and which set owns which
instance. If there are too few candidates, all groups of a set shrink in proportion.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data_pipelines.planning.candidates import SPLITS, Candidate, Pool, Split
from data_pipelines.planning.scan import VideoFacts
from rcot_rl.recipe.data_section import DataSection, SetSize, has_traces

Task = Literal["aks", "ktg"]
Option = Literal["A", "B", ""]
Target = Literal["single", "multi", "none"]
_TARGETS: tuple[Target, ...] = ("none", "single", "multi")


@dataclass(frozen=True)
class Instance:
    """One row to make."""

    set_name: str
    split: Split
    index: int
    """Position in its split."""
    task: Task
    corpus: int
    dataset: str
    video: str
    expression_id: str
    frame_index: int
    target: Target
    option: Option
    """AKS: the correct answer."""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """The identity that sets must not share."""
        return (self.dataset, self.video, self.expression_id, self.frame_index)


@dataclass(frozen=True)
class PlanLine:
    """One demand of a set: rows asked for, available and given."""

    set_name: str
    split: str
    group: str
    asked: int
    available: int
    given: int


def divide(n: int, ratio: float | None) -> tuple[int, int]:
    """Split `n` as `ratio` to 1; the first part is rounded half up. `ratio` must not be None."""
    if ratio is None:
        raise ValueError("no ratio to divide by")
    first = int(np.floor(n * ratio / (ratio + 1.0) + 0.5))
    return first, n - first


@dataclass(frozen=True)
class _Quota:
    """Rows that a set wants, and how they divide into groups."""

    n: int
    parts: Callable[[int], dict[Pool, int]]

    def largest(self, available: Mapping[Pool, int]) -> int:
        """Return the largest n, at most `self.n`, whose parts are all available."""
        low, high = 0, self.n
        while low < high:
            middle = (low + high + 1) // 2
            if all(available[g] >= k for g, k in self.parts(middle).items()):
                low = middle
            else:
                high = middle - 1
        return low


def _ktg_quota(n: int, data: DataSection) -> _Quota:
    def parts(count: int) -> dict[Pool, int]:
        none = int(np.floor(count * data.zero_target_share + 0.5))
        if data.single_multi is None:
            return {"any": count - none, "none": none}
        single, multi = divide(count - none, data.single_multi)
        return {"single": single, "multi": multi, "none": none}

    return _Quota(n, parts)


def _aks_quota(n: int, data: DataSection) -> _Quota:
    def parts(count: int) -> dict[Pool, int]:
        a, b = divide(count, data.a_to_b)
        return {"A": a, "B": b}

    return _Quota(n, parts)


class Drawing:
    """The rows of one split: which set owns which instance, and rows per video and set."""

    def __init__(
        self,
        videos: Sequence[VideoFacts],
        data: DataSection,
        split: Split,
        pools: Mapping[Pool, list[Candidate]],
        refused: Mapping[Task, Collection[Candidate]],
    ) -> None:
        self.videos, self.data, self.split, self.pools = videos, data, split, pools
        self.refused = refused
        self.owner: dict[Candidate, str] = {}
        self.rows_of_video: Counter[tuple[str, int]] = Counter()
        self.lines: list[PlanLine] = []

    def fill(
        self, demands: Mapping[str, SetSize], seed: int
    ) -> dict[tuple[str, Split], tuple[Instance, ...]]:
        """Return every set's rows; KTG first: option A may show a KTG instance of its own set."""
        drawn: dict[str, list[Instance]] = defaultdict(list)
        ktg = {name: size.ktg for name, size in demands.items() if size.ktg}
        # keyframes are scarce: KTG leaves some for option A of the sets without KTG rows
        later = {
            f"aks of {name}": divide(size.aks, self.data.a_to_b)[0]
            for name, size in demands.items()
            if size.aks and not size.ktg
        }
        for name in ktg:
            quota = _ktg_quota(ktg[name], self.data)
            chosen = self._draw_set(name, "ktg", quota, {**ktg, **later})
            drawn[name] += [
                self._instance(name, "ktg", c, "") for group in chosen.values() for c in group
            ]
        # sets without KTG rows can only use keyframes that are left, so they choose first
        order = sorted((n for n, s in demands.items() if s.aks), key=lambda n: n in ktg)
        waiting = {name: demands[name].aks for name in order}
        for name in order:
            chosen = self._draw_set(name, "aks", _aks_quota(waiting[name], self.data), waiting)
            drawn[name] += [self._instance(name, "aks", c, "A") for c in chosen["A"]]
            drawn[name] += [self._instance(name, "aks", c, "B") for c in chosen["B"]]
            del waiting[name]
        out = {}
        for number, name in enumerate(demands):
            rng = np.random.default_rng([seed, SPLITS.index(self.split), 100 + number])
            rows = [drawn[name][i] for i in rng.permutation(len(drawn[name]))]
            out[name, self.split] = tuple(replace(r, index=i) for i, r in enumerate(rows))
        return out

    def _draw_set(
        self, name: str, task: Task, quota: _Quota, competing: Mapping[str, int]
    ) -> dict[Pool, list[Candidate]]:
        """Return candidates by group; fewer, at the same ratios, if there are not enough."""
        pools = {g: self._open(name, task, g) for g in quota.parts(quota.n)}
        available = {g: len(pool) for g, pool in pools.items()}
        asked = quota.parts(quota.n)
        fair = {g: self._fair(name, task, g, len(pool), competing) for g, pool in pools.items()}
        n = quota.largest(fair) if self.data.allow_smaller else quota.n
        while True:
            chosen = {g: self._draw(name, pools[g], k) for g, k in quota.parts(n).items()}
            reached = quota.largest({g: len(c) for g, c in chosen.items()})
            if not self.data.allow_smaller or reached >= n:
                break
            for group in chosen.values():
                self._release(name, group)
            n = reached
        for group in chosen.values():
            self.owner.update((c, name) for c in group)
        for g in asked:
            if asked[g]:
                label = f"{task} {g}"
                self.lines.append(
                    PlanLine(name, self.split, label, asked[g], available[g], len(chosen[g]))
                )
        return chosen

    def _open(self, name: str, task: Task, group: Pool) -> list[Candidate]:
        """Return a group's candidates that are not taken by another set, or by this task."""
        pool = self.pools[group]
        if self.refused.get(task) and has_traces(name):
            pool = [c for c in pool if c not in self.refused[task]]
        if task == "aks" and group == "A":
            return [c for c in pool if self.owner.get(c, name) == name]
        return [c for c in pool if c not in self.owner]

    def _fair(
        self, name: str, task: Task, group: Pool, available: int, competing: Mapping[str, int]
    ) -> int:
        """Return how many candidates a set may take when sets compete: its share of the demand.

        Sets drawn before this one are done, so only the waiting ones count.
        """
        names = list(competing)
        waiting = names[names.index(name) :]
        total = sum(competing[w] for w in waiting)
        reserved = 0
        if task == "aks":
            reserved = sum(1 for c in self.pools[group] if self.owner.get(c) == name)
        shared = available - reserved
        return reserved + shared * competing[name] // total

    def _draw(self, name: str, pool: Sequence[Candidate], n: int) -> list[Candidate]:
        """Take up to `n` of the pool, divided among the corpora by weight or availability."""
        by_corpus: dict[int, list[Candidate]] = defaultdict(list)
        for c in pool:
            by_corpus[self.videos[c.video].corpus].append(c)
        taken: list[Candidate] = []
        while by_corpus and len(taken) < n:
            shares = {
                k: self.data.corpora[k].weight or float(len(left)) for k, left in by_corpus.items()
            }
            for k, quota in _largest_remainder(n - len(taken), shares).items():
                drawn, rest = self._take(name, by_corpus[k], quota)
                taken += drawn
                if rest:
                    by_corpus[k] = rest
                else:
                    del by_corpus[k]
        return taken

    def _take(
        self, name: str, queue: list[Candidate], n: int
    ) -> tuple[list[Candidate], list[Candidate]]:
        """Return the first `n` that decode and respect the cap per video, and the rest."""
        cap = self.data.max_per_video
        drawn: list[Candidate] = []
        at = 0
        while at < len(queue) and len(drawn) < n:
            candidate = queue[at]
            at += 1
            # skipped here, not in the pools, so that all other rows stay as they were drawn
            if candidate.frame in self.videos[candidate.video].undecodable:
                continue
            place = (name, candidate.video)
            if cap is not None and self.rows_of_video[place] >= cap:
                continue
            self.rows_of_video[place] += 1
            drawn.append(candidate)
        return drawn, queue[at:]

    def _release(self, name: str, group: Iterable[Candidate]) -> None:
        for c in group:
            self.rows_of_video[name, c.video] -= 1

    def _instance(self, name: str, task: Task, c: Candidate, option: Option) -> Instance:
        video = self.videos[c.video]
        expression = video.expressions[c.expression]
        target = _TARGETS[min(expression.n_objects, 2)]
        return Instance(
            name,
            self.split,
            -1,
            task,
            video.corpus,
            video.dataset,
            video.video,
            expression.id,
            c.frame,
            target,
            option,
        )


def _largest_remainder(n: int, shares: Mapping[int, float]) -> dict[int, int]:
    """Divide `n` in proportion to `shares`: largest remainders first, ties by key."""
    total = sum(shares.values())
    exact = {k: n * share / total for k, share in shares.items()}
    out = {k: int(x) for k, x in exact.items()}
    by_remainder = sorted(exact, key=lambda k: (out[k] - exact[k], k))
    for k in by_remainder[: n - sum(out.values())]:
        out[k] += 1
    return out
