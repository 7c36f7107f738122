"""Procedural clips: what is in a scene, where it is at every frame, and its exact masks.

Two difficulties. `lattice` can be learnt by a policy of a million parameters: positions on a
lattice, so that an object's box is one of few, before a background from which absolute position can
be read. `rich` has what real video has and a lattice hides: textures, moving backgrounds, free
motion, rotation, occlusion, small objects, objects that enter late, leave and return.

A scene is a value: everything follows from the generator it was made with. Frames and masks are
rendered on demand. Later objects are drawn over earlier ones; a mask is what remains visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.toy.shapes import Texture, background, shape_mask

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 240),
    "yellow": (235, 220, 50),
    "white": (240, 240, 240),
    "purple": (170, 60, 200),
    "orange": (240, 135, 30),
    "cyan": (50, 205, 210),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ellipse", "pentagon")


@dataclass(frozen=True)
class Preset:
    """A difficulty. Sizes and positions are in source pixels."""

    name: str
    size: tuple[int, int]
    """[H, W]."""

    frames: tuple[int, int]
    """Fewest and most frames, both included."""

    objects: tuple[int, int]
    colours: int
    shapes: int
    diameters: tuple[int, int]
    """Smallest and largest; on a lattice, the only two."""

    lattice: int
    """Positions and sizes are multiples of it; 0: free."""

    speed: float
    """Largest displacement a frame, as a share of the frame's side."""

    partial: float
    """Share of objects that are not there all the time."""

    noise: float


PRESETS = {
    "lattice": Preset("lattice", (128, 128), (8, 8), (1, 4), 4, 3, (32, 48), 16, 0.06, 0.5, 6.0),
    "rich": Preset("rich", (144, 192), (12, 20), (2, 5), 8, 7, (18, 56), 0, 0.045, 0.5, 5.0),
}


@dataclass(frozen=True)
class SceneObject:
    """One moving thing: `colour` `shape`, `diameter` px, visible in `spans` (half-open frames)."""

    colour: str
    shape: str
    diameter: int
    start: tuple[float, float]
    """Top-left corner (x, y) at the middle frame."""

    velocity: tuple[float, float]
    """Pixels a frame before reflection at the borders."""

    turn: float
    """Degrees a frame."""

    spans: tuple[tuple[int, int], ...]
    texture: Texture | None

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def present(self, t: int) -> bool:
        return any(a <= t < b for a, b in self.spans)

    @property
    def first(self) -> int:
        """The frame in which it first appears."""
        return self.spans[0][0]


@dataclass(frozen=True)
class Scene:
    """A clip: objects in drawing order, whose index is also their id minus one."""

    preset: Preset
    n_frames: int
    objects: tuple[SceneObject, ...]
    seed: int

    @property
    def size(self) -> tuple[int, int]:
        return self.preset.size

    def corner(self, index: int, t: int) -> tuple[int, int]:
        """Top-left corner (x, y) of object `index`: straight motion, reflected at the borders."""
        item, (height, width) = self.objects[index], self.preset.size
        out = []
        for axis, side in enumerate((width, height)):
            room = side - item.diameter
            moved = item.start[axis] + item.velocity[axis] * (t - self.n_frames // 2)
            folded = moved % (2 * room) if room else 0.0
            place = 2 * room - folded if folded > room else folded
            if self.preset.lattice:
                step = self.preset.lattice
                place = min(round(place / step) * step, room // step * step)
            out.append(round(place))
        return out[0], out[1]

    def whole_masks(self, t: int) -> list[np.ndarray]:
        """Per object, bool [H, W] before occlusion; all False when it is not there."""
        out = []
        for index, item in enumerate(self.objects):
            mask = np.zeros(self.preset.size, dtype=bool)
            if item.present(t):
                x, y = self.corner(index, t)
                stamp = shape_mask(item.shape, item.diameter, round(item.turn * t) % 360)
                mask[y : y + item.diameter, x : x + item.diameter] = stamp
            out.append(mask)
        return out

    def masks(self, t: int) -> list[np.ndarray]:
        """Per object, bool [H, W] of what is visible in frame `t`."""
        masks = self.whole_masks(t)
        covered = np.zeros(self.preset.size, dtype=bool)
        for index in range(len(masks) - 1, -1, -1):
            masks[index] &= ~covered
            covered |= masks[index]
        return masks

    def visible(self, t: int) -> list[bool]:
        """Per object, whether any of it can be seen in frame `t`."""
        return [bool(mask.any()) for mask in self.masks(t)]

    def render(self, t: int) -> np.ndarray:
        """Frame `t`, uint8 [H, W, 3] RGB."""
        rng = np.random.default_rng([self.seed, t])
        image = background(self.preset.name, self.preset.size, self.seed, t)
        for item, mask in zip(self.objects, self.masks(t), strict=True):
            colour = np.array(COLOURS[item.colour], np.float32)
            if item.texture is None:
                image[mask] = colour
            else:
                image[mask] = item.texture.paint(colour, self.preset.size, t)[mask]
        image += rng.standard_normal(image.shape, dtype=np.float32) * self.preset.noise
        return np.clip(image, 0, 255).astype(np.uint8)

    @property
    def order(self) -> list[int]:
        """Object indices by first appearance, then left to right, then top to bottom, there."""

        def key(index: int) -> tuple[int, int, int, int]:
            first = self.objects[index].first
            return (first, *self.corner(index, first), index)

        return sorted(range(len(self.objects)), key=key)

    def describe(self) -> str:
        """The video's description: "first red circle, then blue square"."""
        return "first " + ", then ".join(self.objects[i].name for i in self.order)


def make_scene(rng: np.random.Generator, preset: Preset) -> Scene:
    """A scene drawn from `rng`; every (colour, shape) occurs once.

    What is in it is drawn first; motions in which two boxes overlap much are drawn again on the
    lattice, where occlusion would only blur the task. So the number of objects stays uniform.
    """
    n_frames = int(rng.integers(preset.frames[0], preset.frames[1] + 1))
    colours, shapes = list(COLOURS)[: preset.colours], SHAPES[: preset.shapes]
    count = int(rng.integers(preset.objects[0], preset.objects[1] + 1))
    kinds = [int(k) for k in rng.choice(len(colours) * len(shapes), count, replace=False)]
    names = [(colours[k % len(colours)], shapes[k // len(colours)]) for k in kinds]
    seed = int(rng.integers(1 << 31))
    for _ in range(400):
        objects = tuple(_draw_object(rng, preset, n_frames, *name) for name in names)
        scene = Scene(preset, n_frames, objects, seed)
        if not preset.lattice or not _crowded(scene):
            break
    return scene


def _draw_object(
    rng: np.random.Generator, preset: Preset, n_frames: int, colour: str, shape: str
) -> SceneObject:
    height, width = preset.size
    small, large = preset.diameters
    diameter = (
        int(rng.choice([small, large])) if preset.lattice else int(rng.integers(small, large))
    )
    start = (float(rng.uniform(0, width - diameter)), float(rng.uniform(0, height - diameter)))
    speed = preset.speed * np.array([width, height])
    velocity = rng.uniform(-1, 1, 2) * speed
    turn = 0.0 if preset.lattice else float(rng.uniform(-6, 6))
    texture = None if preset.lattice else Texture.draw(rng)
    return SceneObject(
        colour,
        shape,
        diameter,
        start,
        (float(velocity[0]), float(velocity[1])),
        turn,
        _draw_spans(rng, preset, n_frames),
        texture,
    )


def _draw_spans(
    rng: np.random.Generator, preset: Preset, n_frames: int
) -> tuple[tuple[int, int], ...]:
    if rng.random() >= preset.partial:
        return ((0, n_frames),)
    length = int(rng.integers(max(2, n_frames // 4), n_frames))
    start = int(rng.integers(0, n_frames - length + 1))
    if length >= 5 and rng.random() < 0.25:  # leaves and comes back
        gap = start + int(rng.integers(2, length - 2))
        return ((start, gap), (gap + 1, start + length))
    return ((start, start + length),)


def _crowded(scene: Scene) -> bool:
    for t in range(scene.n_frames):
        here = [i for i, item in enumerate(scene.objects) if item.present(t)]
        boxes = [(*scene.corner(i, t), scene.objects[i].diameter) for i in here]
        for k, a in enumerate(boxes):
            if any(_box_iou(a, b) > 0.05 for b in boxes[k + 1 :]):
                return True
    return False


def _box_iou(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
    if across <= 0 or down <= 0:
        return 0.0
    both = across * down
    return both / (a[2] ** 2 + b[2] ** 2 - both)
