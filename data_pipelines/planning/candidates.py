"""Candidates for rows: which frames of which expressions can serve which pool.

Pools: `single`, `multi`, `any` (KTG by number of targets), `none` (KTG without a target), `A` and
`B` (AKS). Also splits videos into training and validation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from data_pipelines.geometry import empty_frames, keyframe
from data_pipelines.planning.scan import ExpressionFacts, VideoFacts
from rcot_rl.recipe.data_section import DataSection

Pool = Literal["single", "multi", "any", "none", "A", "B"]
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
KeyframeMode = Literal["largest", "any_visible"]
POOLS: tuple[Pool, ...] = ("single", "multi", "any", "none", "A", "B")


class Candidate(NamedTuple):
    """Position of the video in the scan, of the expression in the video, and of the frame."""

    video: int
    expression: int
    frame: int


def split_videos(
    videos: Sequence[VideoFacts], data: DataSection, seed: int
) -> dict[Split, list[int]]:
    """Return the positions of the training and of the validation videos.

    Videos of the same name in several corpora (ReVOS reuses clips of other corpora) go to the same
    split. The choice is made per corpus, so that each has its share.
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
    pool: Pool,
    mode: KeyframeMode,
    seed: Sequence[int],
) -> list[Candidate]:
    """Return the candidates of a pool in random order; no expression repeats before all had one.

    Args:
        chosen: Positions in `videos`.
    """
    rng = np.random.default_rng(list(seed))
    ranked: list[tuple[int, int, int, int]] = []
    for v in chosen:
        video = videos[v]
        for e, expression in enumerate(video.expressions):
            frames = _frames(expression, pool, mode)
            frames = frames[video.usable_t[frames]]
            if frames.size > 1:
                frames = rng.permutation(frames)
            ranked += [(rank, v, e, f) for rank, f in enumerate(frames.tolist())]
    if not ranked:
        return []
    table = np.asarray(ranked, dtype=np.int64)
    order = np.lexsort((rng.random(len(table)), table[:, 0]))
    return [Candidate(v, e, f) for _, v, e, f in table[order].tolist()]


def _frames(expression: ExpressionFacts, pool: Pool, mode: KeyframeMode) -> np.ndarray:
    """Return the indices of the frames in which `expression` can serve `pool`."""
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
    if pool != "A" and unfit_for_ktg(expression, key):
        return nothing
    return np.array([key], dtype=np.int64)


def unfit_for_ktg(expression: ExpressionFacts, key: int) -> str:
    """Return why the keyframe `key` cannot be a KTG row; empty if it can."""
    if expression.n_objects > 1 and expression.visible_t[key] < 2:
        return "several_targets_one_visible_in_keyframe"
    if expression.thin_t[key]:
        return "target_too_thin_for_the_canvas"
    return ""
