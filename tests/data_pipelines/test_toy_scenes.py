"""Procedural scenes: what they promise, measured on their masks and frames."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.toy.scenes import COLOURS, PRESETS, SHAPES, Scene, make_scene
from data_pipelines.toy.shapes import shape_mask


def scenes(preset: str, n: int = 40) -> list[Scene]:
    return [make_scene(np.random.default_rng([3, i]), PRESETS[preset]) for i in range(n)]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_masks_are_what_remains_visible(preset: str) -> None:
    """Disjoint, covering what the whole shapes cover, the later object over the earlier."""
    for scene in scenes(preset, 12):
        for t in range(scene.n_frames):
            whole, visible = np.array(scene.whole_masks(t)), np.array(scene.masks(t))
            assert visible.shape == (len(scene.objects), *scene.size) and visible.dtype == bool
            assert visible.sum(0).max() <= 1
            assert np.array_equal(visible.any(0), whole.any(0))
            assert np.array_equal(visible[-1], whole[-1])
            assert not (visible & ~whole).any()
            there = [o.present(t) for o in scene.objects]
            assert [bool(m.any()) for m in whole] == there
            assert scene.visible(t) == [bool(m.any()) for m in visible]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_scene_is_a_function_of_its_generator(preset: str) -> None:
    first, second = (make_scene(np.random.default_rng(9), PRESETS[preset]) for _ in range(2))
    assert first == second
    assert np.array_equal(first.render(3), second.render(3))
    assert make_scene(np.random.default_rng(10), PRESETS[preset]) != first


@pytest.mark.parametrize("preset", list(PRESETS))
def test_ranges(preset: str) -> None:
    p = PRESETS[preset]
    for scene in scenes(preset):
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
        for i, item in enumerate(scene.objects):
            path = np.array([scene.corner(i, t) for t in range(scene.n_frames)])
            assert path.min() >= 0
            assert (path + item.diameter <= [p.size[1], p.size[0]]).all()
            step = np.abs(np.diff(path, axis=0)).max(0)
            assert (step <= np.array([p.size[1], p.size[0]]) * p.speed + max(p.lattice, 1)).all()


def test_the_lattice_has_few_boxes_and_no_crowd() -> None:
    p = PRESETS["lattice"]
    for scene in scenes("lattice"):
        for t in range(scene.n_frames):
            for i, item in enumerate(scene.objects):
                assert item.diameter in p.diameters
                assert all(c % p.lattice == 0 for c in scene.corner(i, t))
            whole, visible = np.array(scene.whole_masks(t)), np.array(scene.masks(t))
            assert visible.sum() >= 0.85 * whole.sum()


def test_rich_scenes_have_what_a_lattice_hides() -> None:
    """Occlusion, late entries, objects that leave and return, turning, moving backgrounds."""
    found = set()
    for scene in scenes("rich"):
        for item in scene.objects:
            found |= {"late"} if item.first > 0 else set()
            found |= {"returns"} if len(item.spans) > 1 else set()
            found |= {"turns"} if abs(item.turn) > 1 else set()
            found |= {"small"} if item.diameter < 0.2 * scene.size[0] else set()
        whole, visible = np.array(scene.whole_masks(2)), np.array(scene.masks(2))
        found |= {"occluded"} if visible.sum() < whole.sum() else set()
    assert found == {"late", "returns", "turns", "small", "occluded"}
    scene = scenes("rich", 1)[0]
    free = ~np.array([scene.masks(t) for t in (0, 4)]).any((0, 1))
    assert np.abs(scene.render(0).astype(int) - scene.render(4))[free].mean() > 6


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
def test_areas_of_shapes(shape: str, share: float) -> None:
    """Against the formulas of geometry."""
    assert shape_mask(shape, 200, 0).mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_turning_keeps_the_area_inside_the_box(shape: str) -> None:
    areas = [shape_mask(shape, 120, degrees).mean() for degrees in (7, 33, 90, 181, 300)]
    assert max(areas) - min(areas) < 0.015
    assert not shape_mask(shape, 40, 45).flags.writeable


def test_shapes_differ() -> None:
    masks = [shape_mask(shape, 32, 0) for shape in SHAPES]
    for i, a in enumerate(masks):
        assert all((a != b).mean() > 0.05 for b in masks[i + 1 :])
