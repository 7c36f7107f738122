"""Colours and shapes of procedural scenes, and the difficulties."""

from __future__ import annotations

from dataclasses import dataclass

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
    sizes: tuple[tuple[int, int], ...]
    """The possible frame sizes, [H, W]."""
    frames: tuple[int, int]
    """Minimum and maximum number of frames, inclusive."""
    objects: tuple[int, int]
    colours: int
    shapes: int
    diameters: tuple[int, int]
    """Minimum and maximum; on a lattice, the only two."""
    lattice: int
    """Positions and sizes are multiples of this; 0: free."""
    speed: float
    """Maximum displacement per frame, as a share of the frame's side."""
    partial: float
    """Share of objects that are visible for part of the clip only."""
    bends: float
    """Share of objects, among those visible long enough, that change direction once."""
    noise: float
    ordinals: bool = False
    """Expressions also count and negate: `the shape that appears second`, `all shapes that are not
    red`."""


PRESETS = {
    "lattice": Preset(
        "lattice", ((128, 128),), (8, 8), (1, 4), 4, 3, (32, 48), 16, 0.06, 0.5, 0.0, 6.0
    ),
    "fleeting": Preset(
        "fleeting", ((128, 128),), (8, 8), (2, 5), 4, 3, (32, 48), 16, 0.06, 0.85, 0.0, 6.0, True
    ),
    "rich": Preset(
        "rich",
        ((144, 192), (192, 144), (128, 224), (160, 160)),
        (12, 24),
        (2, 5),
        8,
        7,
        (22, 72),
        0,
        0.045,
        0.5,
        0.3,
        5.0,
    ),
}
