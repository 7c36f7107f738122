"""One clip of a toy corpus: its scene, its expressions and their ids.

A clip depends on (seed, layout, split, index) alone, so clips can be made in any order by any
number of processes. The layout decides the expressions: one target each if the corpus names one
object per expression, several where it can list them, none only where the published corpus has such
expressions. Files are written by `writers.py`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_pipelines.toy.queries import DEFAULT_MIX, ToyQuery, make_queries
from data_pipelines.toy.scenes import PRESETS, Scene, make_scene

SINGLE_TARGET = ("ref-youtube-vos", "reasonvos", "davis17")
"""Layouts whose expressions name exactly one object."""

SOURCES = ("BURST", "VIPSeg", "MOSE", "MeViS")
"""Source corpora of ReasonVOS."""

_SEVERAL = 5 / 7
"""Share of draws with several targets. A scene has few groups to describe, so about two of five
expressions have several targets; together with a corpus of single targets, two such corpora are
enough for the paper's ratio of 3:1."""

_ALONE = 1 / 12
"""Share of clips of multi-target layouts that use the first scene drawn."""

_TRIES = 24
"""Scenes drawn for each of the other clips, to find one with two groups of like objects."""


@dataclass(frozen=True)
class ClipSpec:
    """What a clip depends on, besides its index."""

    layout: str
    split: str
    seed: int
    preset: str
    queries: int
    absent_share: float
    multi_share: float | None = None
    """Share of draws with several targets; None: `_SEVERAL`."""


@dataclass(frozen=True)
class ToyClip:
    """A clip: `frames` are file stems; object `i` of the scene has the id `i + 1`."""

    index: int
    name: str
    source: str
    """ReasonVOS: the source corpus in its folder names; empty for other layouts."""
    scene: Scene
    frames: tuple[str, ...]
    expressions: tuple[tuple[str, ToyQuery], ...]
    """(expression id, query)."""


def layout_key(layout: str, split: str) -> int:
    """Return a seed that differs for every (layout, split)."""
    digest = hashlib.sha256(f"{layout}/{split}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def draw_clip(spec: ClipSpec, index: int) -> ToyClip:
    """Draw clip `index` of a split."""
    rng = np.random.default_rng([spec.seed, layout_key(spec.layout, spec.split), index])
    scene = _draw_scene(rng, spec)
    if spec.layout == "davis17":
        queries = _four_per_object(rng, scene)
    else:
        queries = _queries(rng, scene, spec)
    step = 5 if spec.layout == "ref-youtube-vos" else 1
    digest = hashlib.sha256(f"{spec.layout}/{spec.split}/{spec.seed}/{index}".encode()).hexdigest()
    source = SOURCES[index % len(SOURCES)] if spec.layout == "reasonvos" else ""
    return ToyClip(
        index,
        _name(spec.layout, digest, index),
        source,
        scene,
        tuple(f"{step * t:05d}" for t in range(scene.n_frames)),
        tuple((str(i), q) for i, q in enumerate(queries)),
    )


def _name(layout: str, digest: str, index: int) -> str:
    """Return a name in the style of the published corpora; the index keeps names unique."""
    if layout == "ref-youtube-vos":
        return f"{digest[:6]}{index:04x}"
    if layout == "mevis":
        return f"{digest[:8]}{index:04x}"
    if layout == "revos":
        folder = "UVO/all" if index % 2 == 0 else "TAO/train/YFCC100M"
        return f"{folder}/v_{digest[:12]}{index:04x}"
    return f"clip-{digest[:8]}{index:04x}"


def _draw_scene(rng: np.random.Generator, spec: ClipSpec) -> Scene:
    scene = make_scene(rng, PRESETS[spec.preset])
    if spec.layout in SINGLE_TARGET or rng.random() < _ALONE:
        return scene
    best = scene
    for _ in range(_TRIES):
        if _groups(best) >= 2:
            break
        scene = make_scene(rng, PRESETS[spec.preset])
        best = max(best, scene, key=_groups)
    return best


def _groups(scene: Scene) -> int:
    """Return the number of colours and shapes that several objects share."""
    colours = Counter(o.colour for o in scene.objects)
    shapes = Counter(o.shape for o in scene.objects)
    return sum(n > 1 for n in (*colours.values(), *shapes.values()))


def _queries(rng: np.random.Generator, scene: Scene, spec: ClipSpec) -> list[ToyQuery]:
    single = {k: w for k, w in DEFAULT_MIX[spec.preset].items() if k != "several"}
    if spec.layout in SINGLE_TARGET:
        return make_queries(rng, scene, spec.queries, single)
    share = _SEVERAL if spec.multi_share is None else spec.multi_share
    rest = (1 - share) / sum(single.values())
    mix = {k: rest * w for k, w in single.items()} | {"several": share}
    return make_queries(rng, scene, spec.queries, mix, spec.absent_share)


def _four_per_object(rng: np.random.Generator, scene: Scene) -> list[ToyQuery]:
    """Return four expressions per object: two annotators, first frame and full video.

    The first-frame ones describe what one frame shows; the others describe the whole clip, where
    the scene allows it. Annotators may agree.
    """
    kinds = DEFAULT_MIX[scene.preset.name].keys() - {"attribute", "several"}
    wide = make_queries(rng, scene, 12, dict.fromkeys(sorted(kinds), 1.0))
    out = []
    for index, item in enumerate(scene.objects):
        plain = ToyQuery(f"the {item.name}", (index,), "attribute")
        other = [q for q in wide if q.targets == (index,) and q.kind != "attribute"]
        picks = [other[int(rng.integers(len(other)))] if other else plain for _ in range(2)]
        out += [plain, picks[0], plain, picks[1]]
    return out
