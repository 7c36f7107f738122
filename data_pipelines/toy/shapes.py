"""Stamps, textures and backgrounds of procedural scenes. Pure functions of their arguments."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np


@functools.lru_cache(maxsize=4096)
def shape_mask(shape: str, diameter: int, degrees: int) -> np.ndarray:
    """The shape inside a `diameter` x `diameter` box, turned; bool, not to be written to."""
    y, x = (np.mgrid[0:diameter, 0:diameter].astype(np.float32) + 0.5) / diameter - 0.5
    if degrees:
        angle = np.deg2rad(degrees)
        x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        x, y = x * 1.3, y * 1.3  # a turned square still fits the box
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
        mask = radius <= 0.33 + 0.17 * np.cos(5 * (direction + np.pi / 2))
    elif shape == "pentagon":
        wedge = np.mod(direction + np.pi / 2, 2 * np.pi / 5) - np.pi / 5
        mask = radius * np.cos(wedge) <= 0.5 * np.cos(np.pi / 5)
    else:
        raise ValueError(f"unknown shape {shape}")
    mask.flags.writeable = False
    return mask


@dataclass(frozen=True)
class Texture:
    """Stripes over an object's colour, drifting with the frames."""

    amplitude: float
    period: float
    angle: float
    drift: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Texture:
        return cls(
            float(rng.uniform(0, 30)),
            float(rng.uniform(5, 14)),
            float(rng.uniform(0, np.pi)),
            float(rng.uniform(-1, 1)),
        )

    def paint(self, colour: np.ndarray, size: tuple[int, int], t: int) -> np.ndarray:
        """float32 [H, W, 3]: `colour` (RGB) with the stripes of frame `t`."""
        y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
        along = x * np.cos(self.angle) + y * np.sin(self.angle) + self.drift * t
        wave = self.amplitude * np.sin(2 * np.pi * along / self.period)
        return colour + wave[..., None].astype(np.float32)


def background(preset: str, size: tuple[int, int], seed: int, t: int) -> np.ndarray:
    """float32 [H, W, 3] before objects and noise; a fresh array."""
    if preset == "lattice":
        return _two_axis_gradient(size).copy()
    return _moving_clouds(size, seed, t)


@functools.lru_cache(maxsize=8)
def _two_axis_gradient(size: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
    y, x = y / size[0], x / size[1]
    return np.stack([20 + 90 * x, np.full_like(x, 40), 20 + 90 * y], axis=-1)


def _moving_clouds(size: tuple[int, int], seed: int, t: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 1 << 20])
    cells = int(rng.integers(3, 9))
    coarse = rng.uniform(50, 170, (cells, 2 * cells, 3)).astype(np.float32)
    height, width = size
    wide = cv2.resize(coarse, (2 * width, height), interpolation=cv2.INTER_CUBIC)
    shift = round(float(rng.uniform(-2, 2)) * t) % width
    base = rng.uniform(50, 170, 3).astype(np.float32)
    return 0.5 * wide[:, shift : shift + width] + 0.5 * base
