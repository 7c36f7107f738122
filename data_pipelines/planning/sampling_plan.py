"""The sampling plan: which (dataset, video, expression, frame) becomes which row of which set.

A pure function of the scan's facts, the recipe's data section and the seed (paper, section 3.4). It
gives exact set sizes and ratios (single to multiple targets, option A to B), sets that share no
instance, and validation rows from their own videos. Every expression is used once before any is
used twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.planning.candidates import (
    POOLS,
    SPLITS,
    Candidate,
    Split,
    candidates,
    split_videos,
    unfit_for_ktg,
)
from data_pipelines.planning.row_drawing import Drawing, Instance, PlanLine, Task
from data_pipelines.planning.scan import VideoFacts
from rcot_rl.errors import InputError
from rcot_rl.recipe.data_section import DataSection, SetSize


@dataclass(frozen=True)
class SamplingPlan:
    """Rows of every set, and the demands they were drawn for."""

    rows: Mapping[tuple[str, Split], tuple[Instance, ...]]
    lines: tuple[PlanLine, ...]
    left_out: Mapping[str, int]
    """Reason -> number of expressions that cannot be used."""
    cap: int | None = None
    """`data.max_per_video`."""

    def table(self) -> str:
        """Return the plan as a table for people."""
        head = f"{'set':<16}{'split':<7}{'group':<12}{'asked':>8}{'available':>11}{'given':>8}"
        body = [
            f"{p.set_name:<16}{p.split:<7}{p.group:<12}{p.asked:>8}{p.available:>11}{p.given:>8}"
            for p in self.lines
        ]
        unused = [f"{n} expressions left out: {why}" for why, n in sorted(self.left_out.items())]
        short = [
            f"{p.set_name} {p.split} {p.group}: {p.asked - p.given} fewer than asked, so that the "
            f"ratios hold (data.allow_smaller){_capped(p, self.cap)}"
            for p in self.lines
            if p.given < p.asked
        ]
        return "\n".join([head, *body, *short, *unused])


def make_plan(
    videos: Sequence[VideoFacts],
    data: DataSection,
    seed: int,
    refused: Mapping[Task, Collection[Candidate]] | None = None,
) -> SamplingPlan:
    """Make the plan; equal inputs give equal plans. Raises InputError.

    Args:
        videos: Facts in the corpora's order.
        refused: task -> candidates that SFT sets cannot use because they have no trace.
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
            "add corpora, ask for fewer rows, or set data.allow_smaller",
            key="data.sets",
        )
    for (name, split), instances in rows.items():
        if not instances:
            raise InputError(f"the corpora give no {split} rows", key=f"data.sets.{name}")
    return SamplingPlan(rows, tuple(lines), dict(left_out), data.max_per_video)


def _capped(line: PlanLine, cap: int | None) -> str:
    """Return a note that `data.max_per_video` limits a demand; empty if it does not."""
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
    """Count the expressions that the recipe cannot use, or not for KTG, by reason."""
    out: Counter[str] = Counter()
    for video in videos:
        for e in video.expressions:
            if e.n_objects == 0:
                if data.zero_target_share == 0:
                    out["no_target"] += 1
            elif not e.union_area_t.any():
                out["never_visible"] += 1
            elif data.keyframe == "largest":
                reason = unfit_for_ktg(e, int(np.argmax(e.union_area_t)))
                if reason:
                    out[reason] += 1
    return out
