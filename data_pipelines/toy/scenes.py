"""Procedural scenes: their objects, the objects' place in every frame, and exact masks.

There are two difficulties. `lattice` is learnable by a policy of a million parameters: positions
lie on a lattice, so an object's box is one of few, and the background encodes the position.
`rich` has the properties of real video that the lattice lacks: frames of several sizes, textures,
moving backgrounds, free motion with turns, rotation, occlusion, small objects, and objects that
enter late, leave and return.

A scene is a value that depends only on its random generator. Frames and masks are rendered on
demand. Later objects occlude earlier ones; a mask is the visible part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from data_pipelines.toy.presets import COLOURS, PRESETS, SHAPES, Preset
from data_pipelines.toy.shapes import Texture, background, shape_mask
from reward_fns.components.hungarian_match import box_iou

__all__ = ["COLOURS", "PRESETS", "SHAPES", "Preset", "Scene", "SceneObject", "make_scene"]

_LEG = 3
"""Minimum number of frames on either side of a change of direction."""


@dataclass(frozen=True)
class SceneObject:
    """A moving object: `colour` `shape`, `diameter` px, visible in `spans` (half-open frames)."""

    colour: str
    shape: str
    diameter: int
    start: tuple[float, float]
    """Top-left corner (x, y) at frame `bend`."""
    bend: int
    velocity: tuple[float, float]
    """Pixels per frame until `bend`, before reflection at the borders."""
    velocity_after: tuple[float, float]
    """Pixels per frame from `bend` on; equal to `velocity` for straight motion."""
    turn: float | None
    """Degrees per frame; None: no rotation."""
    spans: tuple[tuple[int, int], ...]
    texture: Texture | None

    @property
    def name(self) -> str:
        """Return the name used in expressions."""
        return f"{self.colour} {self.shape}"

    def present(self, t: int) -> bool:
        """Return True if the object is in frame `t`, occluded or not."""
        return any(a <= t < b for a, b in self.spans)

    @property
    def first(self) -> int:
        """The first frame in which it is present."""
        return self.spans[0][0]


@dataclass(frozen=True)
class Scene:
    """A clip: its objects in drawing order; their index is also their id minus one."""

    preset: Preset
    size: tuple[int, int]
    """[H, W]."""
    n_frames: int
    objects: tuple[SceneObject, ...]
    seed: int

    def corner(self, index: int, t: int) -> tuple[int, int]:
        """Return the top-left corner (x, y) of object `index`, reflected at the borders."""
        item, (height, width) = self.objects[index], self.size
        velocity = item.velocity if t < item.bend else item.velocity_after
        out = []
        for axis, side in enumerate((width, height)):
            room = side - item.diameter
            moved = item.start[axis] + velocity[axis] * (t - item.bend)
            folded = moved % (2 * room) if room else 0.0
            place = 2 * room - folded if folded > room else folded
            if self.preset.lattice:
                step = self.preset.lattice
                place = min(round(place / step) * step, room // step * step)
            out.append(round(place))
        return out[0], out[1]

    def whole_masks(self, t: int) -> list[np.ndarray]:
        """Return bool [H, W] per object, before occlusion; all False if it is not present."""
        out = []
        for index, item in enumerate(self.objects):
            mask = np.zeros(self.size, dtype=bool)
            if item.present(t):
                x, y = self.corner(index, t)
                angle = None if item.turn is None else round(item.turn * t) % 360
                stamp = shape_mask(item.shape, item.diameter, angle)
                mask[y : y + item.diameter, x : x + item.diameter] = stamp
            out.append(mask)
        return out

    def masks(self, t: int) -> list[np.ndarray]:
        """Return bool [H, W] per object: its visible pixels in frame `t`."""
        masks = self.whole_masks(t)
        covered = np.zeros(self.size, dtype=bool)
        for index in range(len(masks) - 1, -1, -1):
            masks[index] &= ~covered
            covered |= masks[index]
        return masks

    def visible(self, t: int) -> list[bool]:
        """Return, per object, whether any of it is visible in frame `t`."""
        return [bool(mask.any()) for mask in self.masks(t)]

    def render(self, t: int) -> np.ndarray:
        """Render frame `t` as uint8 [H, W, 3] RGB."""
        rng = np.random.default_rng([self.seed, t])
        image = background(self.preset.name, self.size, self.seed, t)
        for item, mask in zip(self.objects, self.masks(t), strict=True):
            colour = np.array(COLOURS[item.colour], np.float32)
            if item.texture is None:
                image[mask] = colour
            else:
                image[mask] = item.texture.paint(colour, mask, t)
        image += rng.standard_normal(image.shape, dtype=np.float32) * self.preset.noise
        return np.clip(image, 0, 255).astype(np.uint8)

    @property
    def order(self) -> list[int]:
        """Object indices by first frame; ties go from left to right, then from top to bottom."""

        def key(index: int) -> tuple[int, int, int, int]:
            first = self.objects[index].first
            return (first, *self.corner(index, first), index)

        return sorted(range(len(self.objects)), key=key)

    def describe(self) -> str:
        """Return the video's description: "first red circle, then blue square"."""
        return "first " + ", then ".join(self.objects[i].name for i in self.order)


def make_scene(rng: np.random.Generator, preset: Preset) -> Scene:
    """Draw a scene in which every (colour, shape) occurs at most once.

    The objects are drawn first, and then motions until they fit, so that the number of objects
    stays uniform. On the lattice no two boxes overlap much: occlusion would only make the task
    ambiguous. Otherwise no object is hidden when it first appears, because expressions refer to
    that.
    """
    n_frames = int(rng.integers(preset.frames[0], preset.frames[1] + 1))
    colours, shapes = list(COLOURS)[: preset.colours], SHAPES[: preset.shapes]
    count = int(rng.integers(preset.objects[0], preset.objects[1] + 1))
    kinds = [int(k) for k in rng.choice(len(colours) * len(shapes), count, replace=False)]
    names = [(colours[k % len(colours)], shapes[k // len(colours)]) for k in kinds]
    seed = int(rng.integers(1 << 31))
    # drawn from the seed, not from `rng`: scenes of a preset with one size do not depend on it
    size = preset.sizes[seed % len(preset.sizes)]
    unfit = _crowded if preset.lattice else _hidden_at_first
    for _ in range(400):
        objects = tuple(_draw_object(rng, preset, size, n_frames, *name) for name in names)
        scene = Scene(preset, size, n_frames, objects, seed)
        if not unfit(scene):
            break
    if preset.lattice:
        # by appearance, so that nobody has to guess the order of the annotations
        scene = replace(scene, objects=tuple(scene.objects[i] for i in scene.order))
    return scene


def _draw_object(
    rng: np.random.Generator,
    preset: Preset,
    size: tuple[int, int],
    n_frames: int,
    colour: str,
    shape: str,
) -> SceneObject:
    height, width = size
    small, large = preset.diameters
    diameter = (
        int(rng.choice([small, large])) if preset.lattice else int(rng.integers(small, large))
    )
    start = (float(rng.uniform(0, width - diameter)), float(rng.uniform(0, height - diameter)))
    speed = preset.speed * np.array([width, height])
    drawn = rng.uniform(-1, 1, 2) * speed
    velocity = (float(drawn[0]), float(drawn[1]))
    turn = None if preset.lattice else float(rng.uniform(-6, 6))
    texture = None if preset.lattice else Texture.draw(rng)
    spans = _draw_spans(rng, preset, n_frames)
    straight = SceneObject(
        colour, shape, diameter, start, n_frames // 2, velocity, velocity, turn, spans, texture
    )
    before, after = _legs(spans)
    if preset.bends and min(before, after) >= _LEG and rng.random() < preset.bends:
        return _bent(rng, straight, size, speed)
    return straight


def _legs(spans: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Return the frames from an object's first to its middle frame, and from there to its last."""
    first, last = spans[0][0], spans[-1][1] - 1
    middle = (first + last) // 2
    return middle - first, last - middle


def _bent(
    rng: np.random.Generator, item: SceneObject, size: tuple[int, int], speed: np.ndarray
) -> SceneObject:
    """Return `item` moving along one axis until its middle frame, then along the other.

    Neither leg meets a border.

    Args:
        speed: Maximum (x, y) in pixels per frame.
    """
    axes = (0, 1) if rng.random() < 0.5 else (1, 0)
    room = (size[1] - item.diameter, size[0] - item.diameter)
    start, velocities = [0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]]
    for leg, (axis, frames) in enumerate(zip(axes, _legs(item.spans), strict=True)):
        length = min(float(speed[axis]) * frames, room[axis]) * float(rng.uniform(0.6, 1.0))
        forward = bool(rng.random() < 0.5)
        velocities[leg][axis] = (length if forward else -length) / frames
        # at the bend the first leg ends and the second begins
        ahead = forward if leg == 1 else not forward
        low, high = (0.0, room[axis] - length) if ahead else (length, float(room[axis]))
        start[axis] = float(rng.uniform(low, high))
    return replace(
        item,
        start=(start[0], start[1]),
        bend=item.first + _legs(item.spans)[0],
        velocity=(velocities[0][0], velocities[0][1]),
        velocity_after=(velocities[1][0], velocities[1][1]),
    )


def _draw_spans(
    rng: np.random.Generator, preset: Preset, n_frames: int
) -> tuple[tuple[int, int], ...]:
    if rng.random() >= preset.partial:
        return ((0, n_frames),)
    length = int(rng.integers(max(2, n_frames // 4), n_frames))
    start = int(rng.integers(0, n_frames - length + 1))
    if length >= 5 and rng.random() < 0.25:  # leaves and returns
        gap = start + int(rng.integers(2, length - 2))
        return ((start, gap), (gap + 1, start + length))
    return ((start, start + length),)


def _crowded(scene: Scene) -> bool:
    for t in range(scene.n_frames):
        present = [i for i, item in enumerate(scene.objects) if item.present(t)]
        corners = [(*scene.corner(i, t), scene.objects[i].diameter) for i in present]
        boxes = [(x, y, x + side, y + side) for x, y, side in corners]
        for k, a in enumerate(boxes):
            if any(box_iou(a, b) > 0.05 for b in boxes[k + 1 :]):
                return True
    return False


def _hidden_at_first(scene: Scene) -> bool:
    """Return True if more than half of some object is covered in its first frame."""
    for index, item in enumerate(scene.objects):
        full, seen = scene.whole_masks(item.first)[index], scene.masks(item.first)[index]
        if 2 * seen.sum() < full.sum():
            return True
    return False
