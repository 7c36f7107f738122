"""Training data of the tiny SAM2: augmented clips of the toy generator, prompted as KTG does.

KTG is keyframe target grounding. A batch has clips and tracks; a track is one object of a clip that
is visible in the clip's first frame, where it is prompted. All randomness comes from the generator
that the caller passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from data_pipelines.geometry import tight_box
from data_pipelines.toy.scenes import PRESETS, make_scene

TRAIN_STREAM = 90210  # the evaluation draws from 90211
SIDE = 128
PRESET_SHARES = {"lattice": 0.4, "fleeting": 0.4, "rich": 0.2}


@dataclass(frozen=True)
class Sam2Stage:
    """One stage of training; sizes are per step."""

    name: str
    steps: int
    side: int
    """Pixels of a frame's side."""
    clips: int
    frames: int
    """Frames per clip."""
    objects: int
    """Most objects per clip."""
    lr: float
    teacher: float
    """Initial probability that the memory is written from the true mask."""


@dataclass(frozen=True)
class LabelledClip:
    """Frames with labels."""

    frames: np.ndarray
    """uint8 [T, S, S, 3] RGB"""
    labels: np.ndarray
    """uint8 [T, S, S]: 0 for background, i + 1 for object i."""


@dataclass(frozen=True)
class Track:
    """One object to track."""

    clip: int
    """Index of its clip in the batch."""
    masks: np.ndarray
    """bool [T, S, S]"""


def draw_clip(rng: np.random.Generator) -> LabelledClip:
    """Draw a scene of any preset, in full length, at 128 x 128 pixels."""
    name = rng.choice(list(PRESET_SHARES), p=list(PRESET_SHARES.values()))
    scene = make_scene(rng, PRESETS[str(name)])
    frames, labels = [], []
    for t in range(scene.n_frames):
        label = np.zeros(scene.size, np.uint8)
        for index, mask in enumerate(scene.masks(t)):
            label[mask] = index + 1
        frames.append(scene.render(t))
        labels.append(label)
    return resize_clip(LabelledClip(np.stack(frames), np.stack(labels)), SIDE)


def resize_clip(clip: LabelledClip, side: int) -> LabelledClip:
    """Return `clip` at side x side pixels; like SAM2, without keeping the aspect ratio."""
    if clip.frames.shape[1:3] == (side, side):
        return clip
    frames = [cv2.resize(f, (side, side), interpolation=cv2.INTER_AREA) for f in clip.frames]
    labels = [cv2.resize(m, (side, side), interpolation=cv2.INTER_NEAREST) for m in clip.labels]
    return LabelledClip(np.stack(frames), np.stack(labels))


def sample_clip(
    rng: np.random.Generator, pool: list[LabelledClip], length: int, side: int
) -> LabelledClip:
    """Return `length` frames of a random clip, randomly mirrored, reversed and recoloured."""
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
    return resize_clip(
        LabelledClip(np.ascontiguousarray(frames), np.ascontiguousarray(labels)), side
    )


def sample_batch(
    rng: np.random.Generator, pool: list[LabelledClip], stage: Sam2Stage
) -> tuple[list[LabelledClip], list[Track]]:
    """Return clips with an object in their first frame, and up to `stage.objects` of each."""
    clips: list[LabelledClip] = []
    tracks: list[Track] = []
    while len(clips) < stage.clips:
        clip = sample_clip(rng, pool, stage.frames, stage.side)
        values, counts = np.unique(clip.labels[0], return_counts=True)
        least = 0.002 * stage.side**2
        visible = [v for v, c in zip(values, counts, strict=True) if v and c > least]
        if not visible:
            continue
        for value in rng.permutation(visible)[: stage.objects]:
            tracks.append(Track(len(clips), clip.labels == value))
        clips.append(clip)
    return clips, tracks


def interior_pixel(mask: np.ndarray) -> tuple[int, int]:
    """Return (x, y) of the pixel of `mask`, bool [H, W], that is farthest from the background."""
    padded = np.pad(mask, 1).astype(np.uint8)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return int(x), int(y)


def draw_prompt(rng: np.random.Generator, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw a jittered box [4] and a pixel [2] of `mask`, in half the cases its most interior one.

    Args:
        mask: bool [H, W], not empty.
    """
    ys, xs = np.nonzero(mask)
    box = np.array(tight_box(mask), np.float32)
    extent = np.array([box[2] - box[0], box[3] - box[1]] * 2)
    box = box + rng.normal(0, rng.choice([0.02, 0.06]), 4) * extent
    if rng.random() < 0.5:
        x, y = interior_pixel(mask)
    else:
        chosen = rng.integers(len(xs))
        x, y = xs[chosen], ys[chosen]
    return box.astype(np.float32), np.array([x, y], np.float32)
