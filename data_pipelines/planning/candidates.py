"""Candidates for rows: which frames of which expressions could be shown for which purpose.

Pools: `single`, `multi`, `any` (KTG by number of targets), `none` (KTG without a target), `A` and
`B` (AKS). Also the split of videos into training and validation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.geometry import empty_frames, keyframe
from data_pipelines.planning.scan import ExpressionFacts, VideoFacts
from rcot_rl.recipe.data import DataSection

POOLS = ("single", "multi", "any", "none", "A", "B")


class Candidate(NamedTuple):
    """Positions: of the video in the scan, of the expression in the video, of the frame."""

    video: int
    expression: int
    frame: int


def split_videos(
    videos: Sequence[VideoFacts], data: DataSection, seed: int
) -> dict[str, list[int]]:
    """Positions of the training and of the validation videos.

    Videos of several corpora that bear the same name (ReVOS takes clips from the sources of other
    corpora) fall on the same side. The choice is made per corpus, so that each has its share.
    """
    if not any(size.val for size in data.sets.values()):
        return {"train": list(range(len(videos))), "val": []}
    corpora_of: dict[str, set[int]] = defaultdict(set)
    for video in videos:
        corpora_of[_name(video)].add(video.corpus)
    strata: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, corpora in sorted(corpora_of.items()):
        strata[tuple(sorted(corpora))].append(name)
    held_out: set[str] = set()
    for number, stratum in enumerate(sorted(strata)):
        names = strata[stratum]
        n_val = int(np.floor(len(names) * data.val_fraction + 0.5))
        if n_val == 0 and len(names) > 1:
            n_val = 1
        order = np.random.default_rng([seed, 7, number]).permutation(len(names))
        held_out.update(names[i] for i in order[:n_val])
    return {
        "train": [i for i, v in enumerate(videos) if _name(v) not in held_out],
        "val": [i for i, v in enumerate(videos) if _name(v) in held_out],
    }


def _name(video: VideoFacts) -> str:
    return video.video.rsplit("/", 1)[-1]


def candidates(
    videos: Sequence[VideoFacts],
    chosen: Iterable[int],
    pool: str,
    mode: str,
    seed: Sequence[int],
) -> list[Candidate]:
    """The candidates of a pool in random order, a frame of every expression before a second one.

    chosen: positions in `videos`; mode: `DataSection.keyframe`; seed: for this pool alone.
    """
    rng = np.random.default_rng(list(seed))
    found: list[tuple[int, int, int, int]] = []
    for v in chosen:
        video = videos[v]
        for e, expression in enumerate(video.expressions):
            frames = _frames(expression, pool, mode)
            frames = frames[video.usable_t[frames]]
            if frames.size > 1:
                frames = rng.permutation(frames)
            found += [(rank, v, e, f) for rank, f in enumerate(frames.tolist())]
    if not found:
        return []
    table = np.asarray(found, dtype=np.int64)
    order = np.lexsort((rng.random(len(table)), table[:, 0]))
    return [Candidate(v, e, f) for _, v, e, f in table[order].tolist()]


def _frames(expression: ExpressionFacts, pool: str, mode: str) -> np.ndarray:
    """Indices of the frames in which `expression` can serve `pool`."""
    n, nothing = expression.n_objects, np.zeros(0, dtype=np.int64)
    if pool == "none":
        return np.arange(expression.union_area_t.size) if n == 0 else nothing
    if n == 0 or (pool == "single" and n != 1) or (pool == "multi" and n < 2):
        return nothing
    if pool == "B":
        return empty_frames(expression.union_area_t)
    if mode == "any_visible":
        return np.flatnonzero((expression.visible_t == n) & ((pool == "A") | ~expression.thin_t))
    key = keyframe(expression.union_area_t)
    if key is None:
        return nothing
    if pool != "A" and reason_against(expression, key):
        return nothing
    return np.array([key], dtype=np.int64)


def reason_against(expression: ExpressionFacts, key: int) -> str:
    """Why the keyframe `key` cannot be a KTG row; empty when it can."""
    if expression.n_objects > 1 and expression.visible_t[key] < 2:
        return "several_targets_one_visible_in_keyframe"
    if expression.thin_t[key]:
        return "target_too_thin_for_the_canvas"
    return ""
