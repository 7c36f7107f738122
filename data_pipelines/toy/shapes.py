"""Shapes, textures and backgrounds of procedural scenes; pure functions of their arguments."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np


@functools.lru_cache(maxsize=4096)
def shape_mask(shape: str, diameter: int, degrees: int | None = None) -> np.ndarray:
    """Return the shape in a `diameter` x `diameter` box: bool [d, d], read-only.

    Args:
        degrees: Rotation; the shape then fits the box at every angle. None: not rotated, and as
            large as the box.
    """
    y, x = (np.mgrid[0:diameter, 0:diameter].astype(np.float32) + 0.5) / diameter - 0.5
    if degrees is not None:
        angle = np.deg2rad(degrees)
        x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        x, y = x * np.sqrt(2), y * np.sqrt(2)
    radius, direction = np.hypot(x, y), np.arctan2(y, x)
    if shape == "circle":
        mask = radius <= 0.5
    elif shape == "square":
        mask = np.maximum(abs(x), abs(y)) <= 0.5
    elif shape == "triangle":
        mask = (abs(x) <= (y + 0.5) * 0.5) & (abs(y) <= 0.5)
    elif shape == "cross":
        mask = (np.minimum(abs(x), abs(y)) < 0.17) & (np.maximum(abs(x), abs(y)) <= 0.5)
    elif shape == "ellipse":
        mask = (x / 0.5) ** 2 + (y / 0.3) ** 2 <= 1
    elif shape == "star":
        mask = _star(radius, direction)
    elif shape == "pentagon":
        wedge = np.mod(direction + np.pi / 2, 2 * np.pi / 5) - np.pi / 5
        mask = radius * np.cos(wedge) <= 0.5 * np.cos(np.pi / 5)
    else:
        raise ValueError(f"unknown shape {shape}")
    mask.flags.writeable = False
    return mask


def _star(radius: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Return a star: five tips at radius 0.5, the first upwards, notches at 0.21 between them."""
    fifth = 2 * np.pi / 5
    from_tip = abs(np.mod(direction + np.pi / 2 + fifth / 2, fifth) - fifth / 2)
    x, y = radius * np.cos(from_tip), radius * np.sin(from_tip)
    notch_x, notch_y = 0.21 * np.cos(fifth / 2), 0.21 * np.sin(fifth / 2)
    return (x - 0.5) * notch_y <= y * (notch_x - 0.5)


@dataclass(frozen=True)
class Texture:
    """Stripes over an object's colour, drifting with the frames."""

    amplitude: float
    period: float
    angle: float
    drift: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Texture:
        """Draw a random texture."""
        return cls(
            float(rng.uniform(0, 30)),
            float(rng.uniform(5, 14)),
            float(rng.uniform(0, np.pi)),
            float(rng.uniform(-1, 1)),
        )

    def paint(self, colour: np.ndarray, mask: np.ndarray, t: int) -> np.ndarray:
        """Return float32 [N, 3] RGB: `colour` with frame `t`'s stripes at the mask's N pixels."""
        y, x = (places.astype(np.float32) for places in np.nonzero(mask))
        along = x * np.cos(self.angle) + y * np.sin(self.angle) + self.drift * t
        wave = self.amplitude * np.sin(2 * np.pi * along / self.period)
        return colour + wave[..., None].astype(np.float32)


def background(preset: str, size: tuple[int, int], seed: int, t: int) -> np.ndarray:
    """Return a new float32 [H, W, 3] background, before objects and noise."""
    if preset != "rich":
        return _two_axis_gradient(size).copy()
    return _moving_clouds(size, seed, t)


@functools.lru_cache(maxsize=8)
def _two_axis_gradient(size: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
    y, x = y / size[0], x / size[1]
    return np.stack([20 + 90 * x, np.full_like(x, 40), 20 + 90 * y], axis=-1)


def _moving_clouds(size: tuple[int, int], seed: int, t: int) -> np.ndarray:
    """Return coarse and fine clouds over a plain colour, drifting sideways."""
    plain, strips = _cloud_strips(size, seed)
    image = np.empty((*size, 3), np.float32)
    image[:] = plain
    for strip, drift in strips:
        left = size[1] + round(drift * t)
        image += strip[:, left : left + size[1]]
    return image


@functools.lru_cache(maxsize=4)
def _cloud_strips(
    size: tuple[int, int], seed: int
) -> tuple[np.ndarray, list[tuple[np.ndarray, float]]]:
    """Return a colour, and strips three windows wide with their drift in pixels per frame.

    A window starts at its strip's middle third, so it does not wrap around within a clip.
    """
    rng = np.random.default_rng([seed, 1 << 20])
    plain = (0.45 * rng.uniform(50, 170, 3)).astype(np.float32)
    strips = []
    for cells, weight in ((int(rng.integers(3, 9)), 0.4), (int(rng.integers(12, 30)), 0.15)):
        coarse = rng.uniform(50, 170, (cells, 3 * cells, 3)).astype(np.float32)
        strip = cv2.resize(coarse, (3 * size[1], size[0]), interpolation=cv2.INTER_CUBIC)
        strips.append((weight * strip, float(rng.uniform(-2, 2))))
    return plain, strips
