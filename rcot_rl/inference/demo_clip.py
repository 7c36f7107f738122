"""Drawn clips that no shipped model was trained on: the one of `rcot segment --demo` and its like.

They are `fleeting` clips of the toy corpora, on which the shipped policy was trained, with a seed
of their own. `python -m rcot_rl.tiny.trained_eval` measures how often the shipped models are right
on such clips; the demo shows one on which they are.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from data_pipelines.toy.clips import ClipSpec, draw_clip
from data_pipelines.toy.queries import ToyQuery
from data_pipelines.toy.scenes import Scene
from rcot_rl.inference.video import write_video

SEED = 2605
DEMO_INDEX = 20
"""A clip on which the shipped models succeed, after they have refused two frames."""
RATE = Fraction(2)
"""Frames per second."""

_SPEC = ClipSpec("mevis", "valid_u", SEED, "fleeting", queries=1, absent_share=0.0)


def unseen_clip(index: int) -> tuple[Scene, ToyQuery]:
    """Return clip `index` and its query, which has at least one target."""
    clip = draw_clip(_SPEC, index)
    return clip.scene, clip.expressions[0][1]


def truth(scene: Scene, query: ToyQuery) -> np.ndarray:
    """Return bool `[T, H, W]`: the union of the targets' masks."""
    targets = list(query.targets)
    return np.stack(
        [np.any(np.stack(scene.masks(t))[targets], axis=0) for t in range(scene.n_frames)]
    )


def write_clip_video(path: Path, scene: Scene) -> None:
    """Write a scene as mp4."""
    write_video(path, (scene.render(t) for t in range(scene.n_frames)), RATE)
