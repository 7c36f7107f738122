"""Guarantees of procedural scenes, measured on their masks and frames."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from data_pipelines.toy.scenes import COLOURS, PRESETS, SHAPES, Scene, make_scene
from data_pipelines.toy.shapes import background, shape_mask


def scenes(preset: str, n: int = 40) -> list[Scene]:
    return [make_scene(np.random.default_rng([3, i]), PRESETS[preset]) for i in range(n)]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_masks_are_what_remains_visible(preset: str) -> None:
    """Masks are disjoint and cover the union of the shapes; later objects occlude earlier ones."""
    for scene in scenes(preset, 12):
        for t in range(scene.n_frames):
            whole, visible = np.array(scene.whole_masks(t)), np.array(scene.masks(t))
            assert visible.shape == (len(scene.objects), *scene.size) and visible.dtype == bool
            assert visible.sum(0).max() <= 1
            assert np.array_equal(visible.any(0), whole.any(0))
            assert np.array_equal(visible[-1], whole[-1])
            assert not (visible & ~whole).any()
            present = [o.present(t) for o in scene.objects]
            assert [bool(m.any()) for m in whole] == present
            assert scene.visible(t) == [bool(m.any()) for m in visible]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_scene_is_a_function_of_its_generator(preset: str) -> None:
    first, second = (make_scene(np.random.default_rng(9), PRESETS[preset]) for _ in range(2))
    assert first == second
    assert np.array_equal(first.render(3), second.render(3))
    assert make_scene(np.random.default_rng(10), PRESETS[preset]) != first


@pytest.mark.parametrize("preset", list(PRESETS))
def test_scenes_stay_in_the_presets_ranges(preset: str) -> None:
    p = PRESETS[preset]
    for scene in scenes(preset):
        assert scene.size in p.sizes
        assert p.frames[0] <= scene.n_frames <= p.frames[1]
        assert p.objects[0] <= len(scene.objects) <= p.objects[1]
        assert len({o.name for o in scene.objects}) == len(scene.objects)
        for item in scene.objects:
            assert item.colour in list(COLOURS)[: p.colours] and item.shape in SHAPES[: p.shapes]
            bounds = [b for span in item.spans for b in span]
            assert bounds == sorted(set(bounds)) and bounds[0] >= 0 and bounds[-1] <= scene.n_frames
            assert item.first == next(t for t in range(scene.n_frames) if item.present(t))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_objects_stay_inside_and_move_no_faster_than_the_preset_says(preset: str) -> None:
    p = PRESETS[preset]
    for scene in scenes(preset):
        height, width = scene.size
        for i, item in enumerate(scene.objects):
            path = np.array([scene.corner(i, t) for t in range(scene.n_frames)])
            assert path.min() >= 0
            assert (path + item.diameter <= [width, height]).all()
            step = np.abs(np.diff(path, axis=0)).max(0)
            assert (step <= np.array([width, height]) * p.speed + max(p.lattice, 1)).all()


@pytest.mark.parametrize("preset", ["lattice", "fleeting"])
def test_a_lattice_has_few_boxes_no_crowd_and_objects_by_appearance(preset: str) -> None:
    p = PRESETS[preset]
    for scene in scenes(preset):
        assert scene.order == list(range(len(scene.objects)))
        for t in range(scene.n_frames):
            for i, item in enumerate(scene.objects):
                assert item.diameter in p.diameters
                assert all(c % p.lattice == 0 for c in scene.corner(i, t))
            whole, visible = np.array(scene.whole_masks(t)), np.array(scene.masks(t))
            assert visible.sum() >= 0.85 * whole.sum()


def test_rich_scenes_have_the_difficulties_of_real_video() -> None:
    """Occlusion, late entries, objects that leave and return, rotation, moving backgrounds."""
    difficulties = set()
    for scene in scenes("rich"):
        for item in scene.objects:
            difficulties |= {"late"} if item.first > 0 else set()
            difficulties |= {"returns"} if len(item.spans) > 1 else set()
            difficulties |= {"turns"} if abs(item.turn or 0) > 1 else set()
            difficulties |= {"bends"} if item.velocity != item.velocity_after else set()
            difficulties |= {"small"} if item.diameter < 0.2 * scene.size[0] else set()
        whole, visible = np.array(scene.whole_masks(2)), np.array(scene.masks(2))
        difficulties |= {"occluded"} if visible.sum() < whole.sum() else set()
        difficulties |= {scene.size}
    assert difficulties == {
        "late",
        "returns",
        "turns",
        "bends",
        "small",
        "occluded",
        *PRESETS["rich"].sizes,
    }
    scene = scenes("rich", 1)[0]
    free = ~np.array([scene.masks(t) for t in (0, 4)]).any((0, 1))
    assert np.abs(scene.render(0).astype(int) - scene.render(4))[free].mean() > 6


def test_backgrounds_drift_without_cuts() -> None:
    """A background changes little from frame to frame, and a lot over the clip."""
    for seed in range(12):
        for size in PRESETS["rich"].sizes:
            frames = [background("rich", size, seed, t) for t in range(PRESETS["rich"].frames[1])]
            steps = [np.abs(b - a).mean() for a, b in pairwise(frames)]
            assert all(f.shape == (*size, 3) for f in frames)
            assert max(steps) < 3 * np.mean(steps) and max(steps) < 6


def test_rich_objects_keep_their_size_and_show_themselves_when_they_appear() -> None:
    for scene in scenes("rich"):
        for i, item in enumerate(scene.objects):
            areas = [m.sum() for t in range(scene.n_frames) if (m := scene.whole_masks(t)[i]).any()]
            assert max(areas) < 1.3 * min(areas)  # what pixels make of small crosses
            assert scene.masks(item.first)[i].sum() >= 0.5 * scene.whole_masks(item.first)[i].sum()


def test_bent_motion_has_two_straight_legs_along_the_axes() -> None:
    bent = 0
    for scene in scenes("rich"):
        for i, item in enumerate(scene.objects):
            if item.velocity == item.velocity_after:
                continue
            bent += 1
            life = range(item.first, item.spans[-1][1])
            path = np.array([scene.corner(i, t) for t in life])
            k = item.bend - item.first
            for leg in (path[: k + 1], path[k:]):
                steps = np.diff(leg, axis=0)
                assert (np.ptp(leg, axis=0) == 0).sum() == 1
                assert (steps >= 0).all() or (steps <= 0).all()
    assert bent > 10


def test_frames_show_the_objects_in_their_colours() -> None:
    for scene in scenes("lattice", 12):
        image = scene.render(2)
        assert image.shape == (*scene.size, 3) and image.dtype == np.uint8
        for item, mask in zip(scene.objects, scene.masks(2), strict=True):
            if mask.any():
                # Noise is clipped at white, hence the width.
                assert np.abs(image[mask].mean(0) - COLOURS[item.colour]).max() < 4


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_description_lists_objects_as_they_appear(preset: str) -> None:
    for scene in scenes(preset):
        assert sorted(scene.order) == list(range(len(scene.objects)))
        places = []
        for i in scene.order:
            first = scene.objects[i].first
            places.append((first, *scene.corner(i, first)))
        assert places == sorted(places)
        names = scene.describe().removeprefix("first ").split(", then ")
        assert names == [scene.objects[i].name for i in scene.order]


@pytest.mark.parametrize(
    ("shape", "share"),
    [("square", 1.0), ("circle", np.pi / 4), ("triangle", 0.5), ("ellipse", 0.3 * np.pi / 2)],
)
def test_areas_of_shapes_equal_the_formulas(shape: str, share: float) -> None:
    """Compared with the formulas; a shape drawn for rotation has half the area."""
    assert shape_mask(shape, 200).mean() == pytest.approx(share, abs=0.01)
    assert shape_mask(shape, 200, 77).mean() == pytest.approx(share / 2, abs=0.01)


def test_a_star_has_five_tips_and_notches() -> None:
    """Its border crosses a circle between notches and tips ten times, the first tip upwards."""
    mask = shape_mask("star", 201)
    angles = np.arange(720) * np.pi / 360
    ring = mask[
        (100 + 70 * np.sin(angles)).round().astype(int),
        (100 + 70 * np.cos(angles)).round().astype(int),
    ]
    assert (ring != np.roll(ring, 1)).sum() == 10
    assert mask[5, 100] and not mask[195, 100]


@pytest.mark.parametrize("shape", SHAPES)
def test_turning_keeps_the_area_inside_the_box(shape: str) -> None:
    areas = [shape_mask(shape, 120, degrees).mean() for degrees in (0, 7, 33, 90, 181, 300)]
    assert max(areas) - min(areas) < 0.015
    assert not shape_mask(shape, 40, 45).flags.writeable


def test_shapes_differ() -> None:
    masks = [shape_mask(shape, 32) for shape in SHAPES]
    for i, a in enumerate(masks):
        assert all((a != b).mean() > 0.05 for b in masks[i + 1 :])
