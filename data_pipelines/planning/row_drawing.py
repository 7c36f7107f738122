"""Drawing rows from pools of candidates: sets of exact size and ratio that share nothing.

The half of the plan that counts: quotas of groups, the corpora's shares, the cap per video, who
owns which instance. When there is too little, all groups of a set give way alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data_pipelines.planning.candidates import Candidate
from data_pipelines.planning.scan import VideoFacts
from rcot_rl.recipe.data import DataSection, SetSize, has_traces

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True)
class Instance:
    """One row to be made."""

    set_name: str
    split: Split
    index: int
    """Position in its split."""
    task: Literal["aks", "ktg"]
    corpus: int
    dataset: str
    video: str
    expression_id: str
    frame_index: int
    target: Literal["single", "multi", "none"]
    option: Literal["A", "B", ""]
    """AKS: the right answer."""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What the sets may not share."""
        return (self.dataset, self.video, self.expression_id, self.frame_index)


@dataclass(frozen=True)
class PlanLine:
    """One demand of a set: what was asked, what the corpora offered, what was given."""

    set_name: str
    split: str
    group: str
    asked: int
    available: int
    given: int


def divide(n: int, ratio: float | None) -> tuple[int, int]:
    """`n` in two parts as `ratio` to 1, the first rounded half up; ratio None is not for this."""
    if ratio is None:
        raise ValueError("no ratio to divide by")
    first = int(np.floor(n * ratio / (ratio + 1.0) + 0.5))
    return first, n - first


@dataclass(frozen=True)
class _Quota:
    """How many rows a set wants of each group, and how to make it smaller."""

    n: int
    parts: Callable[[int], dict[str, int]]

    def largest(self, available: Mapping[str, int]) -> int:
        """The largest n, at most the one asked, whose parts are all available."""
        low, high = 0, self.n
        while low < high:
            middle = (low + high + 1) // 2
            if all(available[g] >= k for g, k in self.parts(middle).items()):
                low = middle
            else:
                high = middle - 1
        return low


def _ktg_quota(n: int, data: DataSection) -> _Quota:
    def parts(count: int) -> dict[str, int]:
        none = int(np.floor(count * data.zero_target_share + 0.5))
        if data.single_multi is None:
            return {"any": count - none, "none": none}
        single, multi = divide(count - none, data.single_multi)
        return {"single": single, "multi": multi, "none": none}

    return _Quota(n, parts)


def _aks_quota(n: int, data: DataSection) -> _Quota:
    def parts(count: int) -> dict[str, int]:
        a, b = divide(count, data.a_to_b)
        return {"A": a, "B": b}

    return _Quota(n, parts)


class Drawing:
    """One split's drawing: who owns which instance, and how many rows a video has in a set."""

    def __init__(
        self,
        videos: Sequence[VideoFacts],
        data: DataSection,
        split: Split,
        pools: Mapping[str, list[Candidate]],
        refused: Mapping[str, Collection[Candidate]],
    ) -> None:
        self.videos, self.data, self.split, self.pools = videos, data, split, pools
        self.refused = refused
        self.owner: dict[Candidate, str] = {}
        self.of_video: Counter[tuple[str, int]] = Counter()
        self.lines: list[PlanLine] = []

    def fill(
        self, demands: Mapping[str, SetSize], seed: int
    ) -> dict[tuple[str, Split], tuple[Instance, ...]]:
        """KTG of every set first: option A may show a KTG instance of its own set again."""
        drawn: dict[str, list[Instance]] = defaultdict(list)
        ktg = {name: size.ktg for name, size in demands.items() if size.ktg}
        # Option A of sets without KTG rows needs keyframes that KTG must leave, when few.
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
        # Sets without KTG rows can only take what is left, so they choose before the others.
        order = sorted((n for n, s in demands.items() if s.aks), key=lambda n: n in ktg)
        waiting = {name: demands[name].aks for name in order}
        for name in order:
            chosen = self._draw_set(name, "aks", _aks_quota(waiting[name], self.data), waiting)
            drawn[name] += [self._instance(name, "aks", c, o) for o in "AB" for c in chosen[o]]
            del waiting[name]
        out = {}
        for number, name in enumerate(demands):
            rng = np.random.default_rng([seed, SPLITS.index(self.split), 100 + number])
            rows = [drawn[name][i] for i in rng.permutation(len(drawn[name]))]
            out[name, self.split] = tuple(replace(r, index=i) for i, r in enumerate(rows))
        return out

    def _draw_set(
        self, name: str, task: str, quota: _Quota, competing: Mapping[str, int]
    ) -> dict[str, list[Candidate]]:
        """Candidates by group. When short, what the ratios allow: all groups give way alike."""
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

    def _open(self, name: str, task: str, group: str) -> list[Candidate]:
        """Candidates of a group that no other set owns, nor this one for the same task."""
        pool = self.pools[group]
        if self.refused.get(task) and has_traces(name):
            pool = [c for c in pool if c not in self.refused[task]]
        if task == "aks" and group == "A":
            return [c for c in pool if self.owner.get(c, name) == name]
        return [c for c in pool if c not in self.owner]

    def _fair(
        self, name: str, task: str, group: str, available: int, competing: Mapping[str, int]
    ) -> int:
        """What a set may take when there is too little for all: its share of what was asked.

        Sets drawn before this one have had theirs, so only the waiting ones count.
        """
        names = list(competing)
        waiting = names[names.index(name) :]
        total = sum(competing[w] for w in waiting)
        own = sum(1 for c in self.pools[group] if self.owner.get(c) == name) if task == "aks" else 0
        shared = available - own
        return own + shared * competing[name] // total

    def _draw(self, name: str, pool: Sequence[Candidate], n: int) -> list[Candidate]:
        """`n` of the pool, or fewer, divided among the corpora by weight or availability."""
        by_corpus: dict[int, list[Candidate]] = defaultdict(list)
        for c in pool:
            by_corpus[self.videos[c.video].corpus].append(c)
        taken: list[Candidate] = []
        while by_corpus and len(taken) < n:
            shares = {
                k: self.data.corpora[k].weight or float(len(left)) for k, left in by_corpus.items()
            }
            for k, quota in _largest_remainder(n - len(taken), shares).items():
                got, rest = self._take(name, by_corpus[k], quota)
                taken += got
                if rest:
                    by_corpus[k] = rest
                else:
                    del by_corpus[k]
        return taken

    def _take(
        self, name: str, queue: list[Candidate], n: int
    ) -> tuple[list[Candidate], list[Candidate]]:
        """The first `n` that decode, under the cap for videos, and what is left of the queue."""
        cap = self.data.max_per_video
        got: list[Candidate] = []
        at = 0
        while at < len(queue) and len(got) < n:
            candidate = queue[at]
            at += 1
            # only here, so that other rows stay as they were drawn before this was known
            if candidate.frame in self.videos[candidate.video].spoiled:
                continue
            place = (name, candidate.video)
            if cap is not None and self.of_video[place] >= cap:
                continue
            self.of_video[place] += 1
            got.append(candidate)
        return got, queue[at:]

    def _release(self, name: str, group: Iterable[Candidate]) -> None:
        for c in group:
            self.of_video[name, c.video] -= 1

    def _instance(
        self, name: str, task: Literal["aks", "ktg"], c: Candidate, option: Literal["A", "B", ""]
    ) -> Instance:
        video = self.videos[c.video]
        expression = video.expressions[c.expression]
        target = ("none", "single", "multi")[min(expression.n_objects, 2)]
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
    """`n` divided as `shares`, whole numbers, largest remainders first; ties by key."""
    total = sum(shares.values())
    exact = {k: n * share / total for k, share in shares.items()}
    out = {k: int(x) for k, x in exact.items()}
    by_remainder = sorted(exact, key=lambda k: (out[k] - exact[k], k))
    for k in by_remainder[: n - sum(out.values())]:
        out[k] += 1
    return out
