"""What the tiny SAM2 is trained on: clips of the toy generator, augmented, and prompts as KTG's.

A batch is some clips and some tracks, a track being one object of one clip that is visible on the
clip's first frame, where it is prompted. Everything is drawn from the generator passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from data_pipelines.toy.scenes import PRESETS, make_scene

TRAIN_STREAM = 90210  # the evaluation draws from 90211
SIDE = 128
LATTICE_SHARE = 0.85


@dataclass(frozen=True)
class Stage:
    """One stretch of training. share: of all CPU time; others: per step."""

    name: str
    share: float
    side: int
    clips: int
    frames: int
    objects: int
    lr: float
    teacher: float
    """Probability, at the start, that the memory is written from the true mask."""


@dataclass(frozen=True)
class Clip:
    """frames: uint8 [T, S, S, 3] RGB. labels: uint8 [T, S, S], 0 background, object i + 1."""

    frames: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Track:
    """One object to follow. clip: its index in the batch. masks: bool [T, S, S]."""

    clip: int
    masks: np.ndarray


def draw_clip(rng: np.random.Generator) -> Clip:
    """A scene of either preset at 128 x 128, whole length."""
    preset = PRESETS["lattice" if rng.random() < LATTICE_SHARE else "rich"]
    scene = make_scene(rng, preset)
    frames, labels = [], []
    for t in range(scene.n_frames):
        label = np.zeros(scene.size, np.uint8)
        for index, mask in enumerate(scene.masks(t)):
            label[mask] = index + 1
        frames.append(scene.render(t))
        labels.append(label)
    return resize_clip(Clip(np.stack(frames), np.stack(labels)), SIDE)


def resize_clip(clip: Clip, side: int) -> Clip:
    """`clip` at side x side, aspect not kept, as SAM2 sees every video."""
    if clip.frames.shape[1:3] == (side, side):
        return clip
    frames = [cv2.resize(f, (side, side), interpolation=cv2.INTER_AREA) for f in clip.frames]
    labels = [cv2.resize(m, (side, side), interpolation=cv2.INTER_NEAREST) for m in clip.labels]
    return Clip(np.stack(frames), np.stack(labels))


def sample_clip(rng: np.random.Generator, pool: list[Clip], length: int, side: int) -> Clip:
    """`length` frames of a random clip, mirrored, reversed and recoloured at random."""
    clip = pool[rng.integers(len(pool))]
    total = len(clip.frames)
    stride = int(rng.integers(1, 3)) if total > 2 * (length - 1) else 1
    start = int(rng.integers(0, total - (length - 1) * stride))
    index = start + np.arange(length) * stride
    if rng.random() < 0.5:
        index = index[::-1]
    frames, labels = clip.frames[index], clip.labels[index]
    for axis in (1, 2):
        if rng.random() < 0.5:
            frames, labels = np.flip(frames, axis), np.flip(labels, axis)
    if rng.random() < 0.5:
        frames = frames[..., rng.permutation(3)]
    return resize_clip(Clip(np.ascontiguousarray(frames), np.ascontiguousarray(labels)), side)


def sample_batch(
    rng: np.random.Generator, pool: list[Clip], stage: Stage
) -> tuple[list[Clip], list[Track]]:
    """Clips with at least one object on their first frame, and up to `stage.objects` of each."""
    clips: list[Clip] = []
    tracks: list[Track] = []
    while len(clips) < stage.clips:
        clip = sample_clip(rng, pool, stage.frames, stage.side)
        values, counts = np.unique(clip.labels[0], return_counts=True)
        least = 0.002 * stage.side**2
        seen = [v for v, c in zip(values, counts, strict=True) if v and c > least]
        if not seen:
            continue
        for value in rng.permutation(seen)[: stage.objects]:
            tracks.append(Track(len(clips), clip.labels == value))
        clips.append(clip)
    return clips, tracks


def draw_prompt(rng: np.random.Generator, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A jittered box [4] and a pixel [2] of `mask`, half the time its most interior one."""
    ys, xs = np.nonzero(mask)
    box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float32)
    extent = np.array([box[2] - box[0], box[3] - box[1]] * 2)
    box = box + rng.normal(0, rng.choice([0.02, 0.06]), 4) * extent
    if rng.random() < 0.5:
        inner = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
        y, x = np.unravel_index(inner.argmax(), inner.shape)
    else:
        chosen = rng.integers(len(xs))
        x, y = xs[chosen], ys[chosen]
    return box.astype(np.float32), np.array([x, y], np.float32)
