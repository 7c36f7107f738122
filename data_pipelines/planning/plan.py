"""The sampling plan: which (dataset, video, expression, frame) becomes which row of which set.

A pure function of scanned metadata, the recipe's data section and the seed (paper, section 3.4):
exact sizes, single to multiple targets, option A to B, sets that share no instance, validation
rows from videos of their own. Candidates are drawn spread over expressions first, frames second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.planning.candidates import (
    POOLS,
    Candidate,
    candidates,
    reason_against,
    split_videos,
)
from data_pipelines.planning.row_drawing import SPLITS, Drawing, Instance, PlanLine, Split
from data_pipelines.planning.scan import VideoFacts
from rcot_rl.errors import InputError
from rcot_rl.recipe.data import DataSection, SetSize


@dataclass(frozen=True)
class Plan:
    rows: Mapping[tuple[str, Split], tuple[Instance, ...]]
    lines: tuple[PlanLine, ...]
    left_out: Mapping[str, int]
    """Why expressions gave no candidate -> how many."""
    cap: int | None = None
    """`data.max_per_video`."""

    def table(self) -> str:
        """The plan for people."""
        head = f"{'set':<16}{'split':<7}{'group':<12}{'asked':>8}{'available':>11}{'given':>8}"
        body = [
            f"{p.set_name:<16}{p.split:<7}{p.group:<12}{p.asked:>8}{p.available:>11}{p.given:>8}"
            for p in self.lines
        ]
        gave = [f"{n} expressions left out: {why}" for why, n in sorted(self.left_out.items())]
        short = [
            f"{p.set_name} {p.split} {p.group}: {p.asked - p.given} fewer than asked, so that the "
            f"ratios hold (data.allow_smaller){_capped(p, self.cap)}"
            for p in self.lines
            if p.given < p.asked
        ]
        return "\n".join([head, *body, *short, *gave])


def make_plan(
    videos: Sequence[VideoFacts],
    data: DataSection,
    seed: int,
    refused: Mapping[str, Collection[Candidate]] | None = None,
) -> Plan:
    """The plan. `videos` in the corpora's order; equal inputs give equal plans.

    refused: task -> candidates that SFT sets cannot show, since no trace could be had of them.

    Raises InputError, with what is available and asked, when a set cannot be filled and
    `data.allow_smaller` is off.
    """
    of_split = split_videos(videos, data, seed)
    needed = {"A", "B", "none"} | ({"single", "multi"} if data.single_multi else {"any"})
    rows: dict[tuple[str, Split], tuple[Instance, ...]] = {}
    lines: list[PlanLine] = []
    left_out: Counter[str] = Counter()
    for number, split in enumerate(SPLITS):
        demands = _demands(data, split)
        if not demands:
            continue
        pools = {
            pool: candidates(videos, of_split[split], pool, data.keyframe, [seed, number, k])
            for k, pool in enumerate(POOLS)
            if pool in needed
        }
        if split == "train":
            left_out.update(_left_out(videos, data))
        drawing = Drawing(videos, data, split, pools, refused or {})
        rows.update(drawing.fill(demands, seed))
        lines.extend(drawing.lines)
    short = [p for p in lines if p.given < p.asked]
    if short and not data.allow_smaller:
        listed = "; ".join(
            f"{p.set_name} {p.split} {p.group}: asked {p.asked}, available {p.available}"
            f"{_capped(p, data.max_per_video)}"
            for p in short
        )
        raise InputError(
            f"the corpora cannot fill the sets ({listed}); "
            "add corpora, ask for less, or set data.allow_smaller",
            key="data.sets",
        )
    for (name, split), instances in rows.items():
        if not instances:
            raise InputError(f"the corpora give no {split} row at all", key=f"data.sets.{name}")
    return Plan(rows, tuple(lines), dict(left_out), data.max_per_video)


def _capped(line: PlanLine, cap: int | None) -> str:
    """Says that the cap for videos is in the way, where it may be."""
    if cap is None or line.available <= line.given:
        return ""
    return f", of which {line.given} at {cap} a video (data.max_per_video)"


def _demands(data: DataSection, split: Split) -> dict[str, SetSize]:
    if split == "train":
        return dict(data.sets)
    return {
        name: SetSize(aks=size.val if size.aks else 0, ktg=size.val if size.ktg else 0)
        for name, size in data.sets.items()
        if size.val
    }


def _left_out(videos: Sequence[VideoFacts], data: DataSection) -> Counter[str]:
    """Expressions that the recipe cannot use, or not for KTG, by cause."""
    out: Counter[str] = Counter()
    for video in videos:
        for e in video.expressions:
            if e.n_objects == 0:
                if data.zero_target_share == 0:
                    out["no_target"] += 1
            elif not e.union_area_t.any():
                out["never_visible"] += 1
            elif data.keyframe == "largest":
                reason = reason_against(e, int(np.argmax(e.union_area_t)))
                if reason:
                    out[reason] += 1
    return out
