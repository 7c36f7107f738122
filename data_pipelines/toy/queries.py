"""Referring expressions of a scene; each has exactly one correct set of targets.

| kind | example | targets |
| --- | --- | --- |
| attribute | the red circle | the only object of that name |
| several | all red shapes, both circles | every object of that colour or shape |
| several | all shapes that are not red | every object of another colour or shape |
| time | the shape that appears last | the object with that place in the order of first frames |
| motion | the shape moving left | the object with the largest net displacement that way |
| motion | the one moving left and then up | the only object with these two legs (`has_legs`) |
| relation | the shape left of the red circle | the only object left of it in every shared frame |
| absent | the red circle, if there is none | none |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.toy.scenes import COLOURS, SHAPES, Scene


@dataclass(frozen=True)
class ToyQuery:
    """An expression and its targets."""

    text: str
    targets: tuple[int, ...]
    """Object indices, ascending; empty if the target is not in the scene."""
    kind: str


DEFAULT_MIX: dict[str, dict[str, float]] = {
    "lattice": {"attribute": 0.55, "several": 0.25, "time": 0.20},
    "fleeting": {"attribute": 0.25, "several": 0.4, "time": 0.35},
    "rich": {"attribute": 0.3, "several": 0.2, "time": 0.15, "motion": 0.2, "relation": 0.15},
}
"""Preset -> share of each kind."""


_WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Word -> (x, y); y points down."""


def make_queries(
    rng: np.random.Generator,
    scene: Scene,
    n: int,
    mix: dict[str, float] | None = None,
    absent_share: float = 0.0,
) -> list[ToyQuery]:
    """Return `n` different queries, or as many as the scene supports.

    Args:
        mix: kind -> weight; None: the preset's. A kind that the scene does not support (`time` if
            two objects appear together) is replaced by `attribute`.
        absent_share: Probability that a query names something that is not in the scene.
    """
    weights = mix or DEFAULT_MIX[scene.preset.name]
    kinds, shares = list(weights), np.array(list(weights.values()))
    queries: dict[str, ToyQuery] = {}
    for _ in range(8 * n):
        if len(queries) == n:
            break
        kind = str(rng.choice(kinds, p=shares / shares.sum()))
        if rng.random() < absent_share:
            kind = "absent"
        options = _MAKERS[kind](scene) or _attribute(scene)
        query = options[int(rng.integers(len(options)))]
        queries.setdefault(query.text, query)
    return list(queries.values())


def _attribute(scene: Scene) -> list[ToyQuery]:
    return [ToyQuery(f"the {o.name}", (i,), "attribute") for i, o in enumerate(scene.objects)]


def plural(shape: str) -> str:
    """Return `circles` for `circle`, and `crosses` for `cross`."""
    return f"{shape}s".replace("crosss", "crosses")


def _several(scene: Scene) -> list[ToyQuery]:
    out = []
    for field in ("colour", "shape"):
        for value in sorted({getattr(o, field) for o in scene.objects}):
            targets = tuple(i for i, o in enumerate(scene.objects) if getattr(o, field) == value)
            text = f"all {value} shapes" if field == "colour" else f"all {plural(value)}"
            out.append(ToyQuery(text, targets, "several"))
            # the lattice uses only the few words of the tiny policy
            if len(targets) == 2 and not scene.preset.lattice:
                out.append(ToyQuery(text.replace("all ", "both "), targets, "several"))
            others = tuple(i for i in range(len(scene.objects)) if i not in targets)
            if scene.preset.ordinals and others:
                left_out = value if field == "colour" else plural(value)
                out.append(ToyQuery(f"all shapes that are not {left_out}", others, "several"))
    many = [q for q in out if len(q.targets) > 1]
    return many or out


def _time(scene: Scene) -> list[ToyQuery]:
    ranked = sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].first)
    firsts = [scene.objects[i].first for i in ranked]
    places = {"last": len(ranked) - 1, "first": 0}
    if scene.preset.ordinals:
        places |= {word: n for n, word in enumerate(("second", "third"), 1) if n < len(ranked) - 1}
    return [
        ToyQuery(f"the shape that appears {word}", (ranked[place],), "time")
        for word, place in places.items()
        if len(ranked) > 1 and firsts.count(firsts[place]) == 1
    ]


def displacement(scene: Scene, index: int) -> tuple[int, int]:
    """Return the (x, y) motion of an object's corner from its first visible frame to its last."""
    frames = [t for t in range(scene.n_frames) if scene.objects[index].present(t)]
    (x0, y0), (x1, y1) = scene.corner(index, frames[0]), scene.corner(index, frames[-1])
    return x1 - x0, y1 - y0


def _motion(scene: Scene) -> list[ToyQuery]:
    moved = [displacement(scene, i) for i in range(len(scene.objects))]
    margin = 0.08 * scene.size[1]
    out = []
    for word, (x, y) in _WAYS.items():
        values = sorted((x * d[0] + y * d[1], i) for i, d in enumerate(moved))
        best, target = values[-1]
        second = values[-2][0] if len(values) > 1 else 0.0
        if best > margin and best > 2 * max(second, 0.0):
            out.append(ToyQuery(f"the shape moving {word}", (target,), "motion"))
    return out + _bends(scene)


def has_legs(path_xy: np.ndarray, first: str, then: str, least: float, ratio: float) -> bool:
    """Return True if a path [N, 2] (pixels) goes `first` and then `then` (left, right, up, down).

    Some frame must split the path into two parts whose net displacements are at least `least`
    pixels in that direction, and more than `ratio` times their displacement across it.
    """

    def goes(moved: np.ndarray, way: str) -> np.ndarray:
        x, y = _WAYS[way]
        along, across = x * moved[:, 0] + y * moved[:, 1], y * moved[:, 0] + x * moved[:, 1]
        return (along >= least) & (along > ratio * abs(across))

    return bool((goes(path_xy - path_xy[0], first) & goes(path_xy[-1] - path_xy, then)).any())


def _bends(scene: Scene) -> list[ToyQuery]:
    """Return queries where one object clearly turns this way and no other does even roughly."""
    margin = 0.12 * min(scene.size)
    paths = [
        np.array([scene.corner(i, t) for t in range(scene.n_frames) if o.present(t)])
        for i, o in enumerate(scene.objects)
    ]
    out = []
    for first, (x, _) in _WAYS.items():
        for then in ("up", "down") if x else ("left", "right"):
            clear = [i for i, p in enumerate(paths) if has_legs(p, first, then, margin, 2.0)]
            vague = [i for i, p in enumerate(paths) if has_legs(p, first, then, margin / 2, 1.0)]
            if len(clear) == len(vague) == 1:
                out.append(
                    ToyQuery(f"the one moving {first} and then {then}", (clear[0],), "motion")
                )
    return out


def _relation(scene: Scene) -> list[ToyQuery]:
    out = []
    for anchor, item in enumerate(scene.objects):
        for word, sign in (("left", -1), ("right", 1)):
            holding = [i for i in range(len(scene.objects)) if _beside(scene, i, anchor, sign)]
            if len(holding) == 1:
                text = f"the shape {word} of the {item.name}"
                out.append(ToyQuery(text, (holding[0],), "relation"))
    return out


def _beside(scene: Scene, index: int, anchor: int, sign: int) -> bool:
    if index == anchor:
        return False
    shared = [
        t
        for t in range(scene.n_frames)
        if scene.objects[index].present(t) and scene.objects[anchor].present(t)
    ]

    def centre(i: int, t: int) -> float:
        return scene.corner(i, t)[0] + scene.objects[i].diameter / 2

    return bool(shared) and all(sign * (centre(index, t) - centre(anchor, t)) > 0 for t in shared)


def _absent(scene: Scene) -> list[ToyQuery]:
    colours: Sequence[str] = list(COLOURS)[: scene.preset.colours]
    names = {o.name for o in scene.objects}
    every = [f"{c} {s}" for c in colours for s in SHAPES[: scene.preset.shapes]]
    return [ToyQuery(f"the {name}", (), "absent") for name in every if name not in names]


_MAKERS: dict[str, Callable[[Scene], list[ToyQuery]]] = {
    "attribute": _attribute,
    "several": _several,
    "time": _time,
    "motion": _motion,
    "relation": _relation,
    "absent": _absent,
}
