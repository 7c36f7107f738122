"""Pre-training data of the tiny policy: procedural clips and questions about them.

The base model learns to perceive: describe a clip (VDG, video description generation), name the
frame that shows a query best (KFG, keyframe generation, and its repetition), list what a frame
shows and where, resolve a query, ground a name. It never sees the prompts with reasoning, AKS
(agentic keyframe selection) and KTG (keyframe target grounding): SFT and GRPO teach those.

Boxes and points are in canvas pixels, from the same geometry as the shards. Every seed starts with
`STREAM`, which no corpus uses, so no clip is shared with a corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from data_pipelines.geometry import ground, to_canvas
from data_pipelines.toy.queries import ToyQuery, make_queries
from data_pipelines.toy.scenes import PRESETS, make_scene
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.tiny.policy_model import IMAGE_CANVAS

STREAM = 70707
"""First word of every seed of this module."""

PRESET = "lattice"
FRAMES = 8
QUERIES = 6
"""Expressions per clip."""


VideoQuestion = Literal["vdg", "kfg", "kfg_again", "times"]
ImageQuestion = Literal["scene", "scene_target", "target", "ground", "ground_query", "present"]
_VIDEO_TASKS: dict[VideoQuestion, float] = {
    "vdg": 0.3,
    "kfg": 0.3,
    "kfg_again": 0.15,
    "times": 0.25,
}
_IMAGE_TASKS: dict[ImageQuestion, float] = {
    "scene": 0.30,
    "scene_target": 0.30,
    "target": 0.05,
    "ground": 0.10,
    "ground_query": 0.15,
    "present": 0.10,
}
"""Kind -> share; those with the longest answers teach most."""

Question = TypeVar("Question", VideoQuestion, ImageQuestion)


@dataclass(frozen=True)
class VisibleObject:
    """A visible object in one frame."""

    box: list[int]
    """[x1, y1, x2, y2], half-open, in canvas pixels"""
    point: list[int]
    """[x, y] in canvas pixels"""
    area: int
    """Visible source pixels."""


@dataclass(frozen=True)
class PolicyClip:
    """One procedural clip as the policy sees it."""

    frames: np.ndarray
    """uint8 [T, S, S, 3] RGB on the canvas"""
    names: tuple[str, ...]
    """Name of each object."""
    order: tuple[int, ...]
    """Object indices in the description's order."""
    description: str
    seen: tuple[dict[int, VisibleObject], ...]
    """For each frame, object index -> visible object."""
    queries: tuple[ToyQuery, ...]

    def union(self, query: ToyQuery, frame: int) -> int:
        """Return the visible source pixels of the query's objects, which never overlap."""
        return sum(self.seen[frame][i].area for i in query.targets if i in self.seen[frame])


@dataclass(frozen=True)
class PretrainSample:
    """One question with its correct response."""

    task: VideoQuestion | ImageQuestion
    prompt: str
    response: str
    frames: np.ndarray
    """uint8 [T, S, S, 3] RGB, T = 1 for an image"""


def make_clip(rng: np.random.Generator) -> PolicyClip:
    """Draw a scene on the canvas; every number of objects is equally frequent."""
    preset = PRESETS[PRESET]
    count = int(rng.integers(preset.objects[0], preset.objects[1] + 1))
    scene = make_scene(rng, replace(preset, objects=(count, count)))
    frames, seen = [], []
    for t in range(FRAMES):
        frames.append(to_canvas(scene.render(t), IMAGE_CANVAS))
        masks = enumerate(scene.masks(t))
        seen.append({i: _item(mask) for i, mask in masks if mask.any()})
    return PolicyClip(
        frames=np.stack(frames),
        names=tuple(o.name for o in scene.objects),
        order=tuple(scene.order),
        description=scene.describe(),
        seen=tuple(seen),
        queries=tuple(make_queries(rng, scene, QUERIES)),
    )


def _item(mask: np.ndarray) -> VisibleObject:
    grounding = ground(mask, IMAGE_CANVAS)
    return VisibleObject(list(grounding.bbox_2d), list(grounding.point_2d), int(mask.sum()))


def make_clips(seed: Sequence[int], count: int) -> list[PolicyClip]:
    """Return `count` clips with seed `[STREAM, *seed]`."""
    rng = np.random.default_rng([STREAM, *seed])
    return [make_clip(rng) for _ in range(count)]


def scene_text(clip: PolicyClip, frame: int) -> str:
    """Return `Scene: red circle at [14, 28, 42, 56], blue square hidden.`, in `clip.order`."""
    seen = clip.seen[frame]
    parts = [
        f"{clip.names[i]} at {seen[i].box}" if i in seen else f"{clip.names[i]} hidden"
        for i in clip.order
    ]
    return f"Scene: {', '.join(parts)}."


def target_text(clip: PolicyClip, query: ToyQuery, frame: int | None = None) -> str:
    """Return `Target: red circle, blue square.`; with a frame, plus `, visible` or `, hidden`."""
    names = [clip.names[i] for i in sorted(query.targets)]
    if frame is not None:
        names.append("visible" if clip.union(query, frame) else "hidden")
    return f"Target: {', '.join(names)}."


def boxes_text(clip: PolicyClip, targets: Sequence[int], frame: int) -> str:
    """Return the JSON list of the targets visible in a frame, by ascending object index."""
    seen = clip.seen[frame]
    rows = [
        {"bbox_2d": seen[i].box, "point_2d": seen[i].point} for i in sorted(targets) if i in seen
    ]
    return json.dumps(rows)


def times_text(clip: PolicyClip) -> str:
    """Return `Seen: red circle 0 to 7, blue square 3 to 5.`: first and last frame of each shape."""
    parts = []
    for i in clip.order:
        frames = [t for t, seen in enumerate(clip.seen) if i in seen]
        span = f"{frames[0]} to {frames[-1]}" if frames else "hidden"
        parts.append(f"{clip.names[i]} {span}")
    return f"Seen: {', '.join(parts)}."


def keyframe(clip: PolicyClip, query: ToyQuery, without: Sequence[int] = ()) -> int:
    """Return the first frame with the largest target union, except frames in `without`."""
    allowed = [t for t in range(len(clip.frames)) if t not in without]
    return max(allowed, key=lambda t: (clip.union(query, t), -t))


def _draw_task(rng: np.random.Generator, shares: dict[Question, float]) -> Question:
    return list(shares)[rng.choice(len(shares), p=list(shares.values()))]


def video_sample(rng: np.random.Generator, clip: PolicyClip, prompts: Prompts) -> PretrainSample:
    """Draw a question about the video: VDG, KFG, its repetition, or when each shape is seen."""
    task = _draw_task(rng, _VIDEO_TASKS)
    query = clip.queries[rng.integers(len(clip.queries))]
    last = len(clip.frames)
    if task == "vdg":
        return PretrainSample("vdg", prompts.vdg(last), clip.description, clip.frames)
    if task == "times":
        return PretrainSample("times", "When is each shape seen?", times_text(clip), clip.frames)
    refused: list[int] = []
    if task == "kfg_again":
        count = int(rng.integers(1, 4))
        refused = [int(t) for t in rng.choice(last, count, replace=False)]
        text = prompts.kfg_again(query.text, last, [(t, "") for t in refused], clip.description)
    else:
        text = prompts.kfg(query.text, last)
    return PretrainSample(
        task, text, f"<answer>{keyframe(clip, query, refused)}</answer>", clip.frames
    )


def image_sample(rng: np.random.Generator, clip: PolicyClip) -> PretrainSample:
    """Draw a perception question about one frame, worded unlike AKS and KTG."""
    task = _draw_task(rng, _IMAGE_TASKS)
    frame = int(rng.integers(len(clip.frames)))
    query = clip.queries[rng.integers(len(clip.queries))]
    one = int(rng.integers(len(clip.names)))
    context = f"Video: {clip.description}.\n"
    with_query = f"{context}Query: {query.text}.\n"
    if task == "scene":
        prompt, response = f"{context}List the shapes.", scene_text(clip, frame)
    elif task == "scene_target":
        prompt = f"{with_query}List the shapes and the target."
        response = f"{scene_text(clip, frame)} {target_text(clip, query, frame)}"
    elif task == "target":
        prompt, response = f"{with_query}Which shapes?", target_text(clip, query)
    elif task == "ground":
        prompt, response = f"Where is the {clip.names[one]}?", boxes_text(clip, [one], frame)
    elif task == "ground_query":
        prompt = f"{with_query}Show the target."
        response = boxes_text(clip, query.targets, frame)
    else:
        prompt = f"Is the {clip.names[one]} in this frame? A: yes, B: no."
        response = "A" if one in clip.seen[frame] else "B"
    if rng.random() < 0.1:
        prompt += " Think first."
        response = f"<think>{scene_text(clip, frame)}</think>\n<answer>{response}</answer>"
    return PretrainSample(task, prompt, response, clip.frames[frame : frame + 1])
