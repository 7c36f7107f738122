"""The targets of an expression follow from its text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from data_pipelines.toy.queries import DEFAULT_MIX, ToyQuery, has_legs, make_queries
from data_pipelines.toy.scenes import PRESETS, SHAPES, Scene, make_scene

KINDS = ("attribute", "several", "time", "motion", "relation", "absent")


def drawn(preset: str, kind: str, n: int = 40) -> list[tuple[Scene, ToyQuery]]:
    """Return queries of one kind, each with its scene."""
    out = []
    for i in range(n):
        rng = np.random.default_rng([4, i])
        scene = make_scene(rng, PRESETS[preset])
        out += [(scene, q) for q in make_queries(rng, scene, 4, {kind: 1.0}) if q.kind == kind]
    return out


def frames_of(scene: Scene, index: int) -> list[int]:
    return [t for t in range(scene.n_frames) if scene.whole_masks(t)[index].any()]


def centre(scene: Scene, index: int, t: int) -> np.ndarray:
    """Return (x, y) of the object's centre."""
    return np.array(scene.corner(index, t)) + scene.objects[index].diameter / 2


def named(scene: Scene, text: str) -> tuple[int, ...]:
    return tuple(i for i, o in enumerate(scene.objects) if f"the {o.name}" == text)


def several(scene: Scene, text: str) -> tuple[int, ...]:
    """Return the objects whose colour or shape follows "all", or "both" if there are two."""
    if " that are not " in text:
        left_out = text.split()[-1]
        rest = several(scene, f"all {left_out}" + ("" if left_out.endswith("s") else " shapes"))
        return tuple(i for i in range(len(scene.objects)) if i not in rest)
    how_many, word = text.split()[:2]
    if text.endswith(" shapes"):
        matching = tuple(i for i, o in enumerate(scene.objects) if o.colour == word)
    else:
        plural = {s: f"{s}es" if s.endswith("s") else f"{s}s" for s in SHAPES}
        matching = tuple(i for i, o in enumerate(scene.objects) if plural[o.shape] == word)
    assert how_many == "all" or (how_many == "both" and len(matching) == 2)
    return matching


def timed(scene: Scene, text: str) -> tuple[int, ...]:
    firsts = [frames_of(scene, i)[0] for i in range(len(scene.objects))]
    place = {"first": 0, "second": 1, "third": 2, "last": -1}[text.split()[-1]]
    best = sorted(firsts)[place]
    return tuple(i for i, f in enumerate(firsts) if f == best)


WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def moving(scene: Scene, text: str) -> tuple[int, ...]:
    if text.startswith("the one moving "):
        return bending(scene, *text.removeprefix("the one moving ").split(" and then "))
    way = WAYS[text.split()[-1]]
    along = []
    for i in range(len(scene.objects)):
        frames = frames_of(scene, i)
        moved = centre(scene, i, frames[-1]) - centre(scene, i, frames[0])
        along.append(float(moved @ way))
    best = max(along)
    assert best > 0
    return tuple(i for i, a in enumerate(along) if a > 0.5 * best)


def bending(scene: Scene, first: str, then: str) -> tuple[int, ...]:
    """Return the objects that move `first`, and from some frame on move `then`.

    A leg goes its way more than across it, by at least 6 % of the frame's shorter side. The
    condition is weak on purpose: an object that almost fits makes the sentence ambiguous.
    """
    least = 0.06 * min(scene.size)

    def leg(a: np.ndarray, b: np.ndarray, way: str) -> bool:
        along = float((b - a) @ WAYS[way])
        across = np.abs(b - a).sum() - abs(along)
        return along >= least and along > across

    out = []
    for i in range(len(scene.objects)):
        path = [centre(scene, i, t) for t in frames_of(scene, i)]
        if any(leg(path[0], turn, first) and leg(turn, path[-1], then) for turn in path):
            out.append(i)
    return tuple(out)


def beside(scene: Scene, text: str) -> tuple[int, ...]:
    words = text.removeprefix("the shape ").split(" of ", 1)
    (anchor,) = named(scene, words[1])
    sign = {"left": -1, "right": 1}[words[0]]
    out = []
    for i in range(len(scene.objects)):
        shared = set(frames_of(scene, i)) & set(frames_of(scene, anchor))
        gaps = [sign * (centre(scene, i, t) - centre(scene, anchor, t))[0] for t in shared]
        if i != anchor and gaps and min(gaps) > 0:
            out.append(i)
    return tuple(out)


ORACLES: dict[str, Callable[[Scene, str], tuple[int, ...]]] = {
    "attribute": named,
    "several": several,
    "time": timed,
    "motion": moving,
    "relation": beside,
    "absent": named,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", list(PRESETS))
def test_targets_follow_from_the_words(preset: str, kind: str) -> None:
    samples = drawn(preset, kind)
    assert len(samples) >= 10
    for scene, query in samples:
        assert ORACLES[kind](scene, query.text) == query.targets
        assert query.targets == tuple(sorted(query.targets))
        if kind not in ("several", "absent"):
            assert len(query.targets) == 1


def test_rich_sentences_of_both_and_of_two_legs() -> None:
    texts = [q.text for kind in ("several", "motion") for _, q in drawn("rich", kind)]
    assert sum(t.startswith("both ") for t in texts) > 5
    assert sum(" and then " in t for t in texts) > 10
    plain = [q.text for kind in ("several", "motion") for _, q in drawn("lattice", kind)]
    assert not any("both " in t for t in plain)


def test_fleeting_expressions_count_and_negate() -> None:
    texts = [q.text for kind in ("several", "time") for _, q in drawn("fleeting", kind)]
    assert sum(" that are not " in t for t in texts) > 10
    assert sum(t.endswith(("second", "third")) for t in texts) > 10
    plain = [q.text for kind in ("several", "time") for _, q in drawn("lattice", kind)]
    assert not any(" not " in t or "second" in t for t in plain)


def test_has_legs_depends_on_the_path_alone() -> None:
    corner = np.array([[50, 50], [30, 50], [10, 50], [10, 30], [10, 10]])
    assert has_legs(corner, "left", "up", 40, 2)
    assert not has_legs(corner, "left", "up", 41, 2)
    assert not has_legs(corner, "up", "left", 20, 1)
    assert not has_legs(corner, "left", "down", 20, 1)
    diagonal = np.array([[50, 50], [40, 40], [30, 30]])
    assert not has_legs(diagonal, "left", "up", 5, 1)


def test_absent_things_share_a_word_with_the_palette_of_the_preset() -> None:
    """Absent objects could have been in the scene."""
    colours = {o.colour for scene, _ in drawn("lattice", "attribute") for o in scene.objects}
    assert {q.text.split()[1] for _, q in drawn("lattice", "absent")} == colours


@pytest.mark.parametrize("preset", list(PRESETS))
def test_sentences_differ_and_repeat_for_the_same_generator(preset: str) -> None:
    for i in range(20):
        scene = make_scene(np.random.default_rng(i), PRESETS[preset])
        once, again = (make_queries(np.random.default_rng(i), scene, 5) for _ in range(2))
        assert once == again and 1 <= len(once) <= 5
        assert len({q.text for q in once}) == len(once)
        assert {q.kind for q in once} <= set(DEFAULT_MIX[preset])


def test_absent_share_is_the_share_of_absent_queries() -> None:
    kinds = []
    for i in range(80):
        scene = make_scene(np.random.default_rng(i), PRESETS["rich"])
        queries = make_queries(np.random.default_rng(i), scene, 4, absent_share=0.25)
        kinds += [q.kind for q in queries]
    assert 0.18 < kinds.count("absent") / len(kinds) < 0.34


def test_a_kind_that_the_scene_lacks_gives_way_to_attributes() -> None:
    for i in range(40):
        scene = make_scene(np.random.default_rng(i), PRESETS["lattice"])
        if len(scene.objects) == 1:
            queries = make_queries(np.random.default_rng(i), scene, 2, {"time": 1.0})
            assert queries == [ToyQuery(f"the {scene.objects[0].name}", (0,), "attribute")]
            return
    pytest.fail("no scene of one object was drawn")
