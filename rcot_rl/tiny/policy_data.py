"""What the tiny policy is pre-trained on: procedural clips and questions about them.

The base model is to perceive: describe a clip (VDG), name the frame that shows a query best (KFG
and its repetition), list what a frame shows and where, resolve a query, ground a name. The
reasoned AKS and KTG prompts are kept from it: they are what SFT and GRPO teach later.

Boxes and points are in pixels of the policy's canvas, made by the same geometry as the shards.
Every stream is seeded under `STREAM`, which no corpus uses, so no clip is shared with one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipelines.geometry import ground, to_canvas
from data_pipelines.toy.queries import Query, make_queries
from data_pipelines.toy.scenes import PRESETS, make_scene
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.tiny.policy_model import IMAGE_CANVAS

STREAM = 70707
"""First word of every seed of this package."""

PRESET = "lattice"
FRAMES = 8
QUERIES = 6
"""Expressions asked for per clip."""


@dataclass(frozen=True)
class Item:
    """An object in one frame: tight box and inner point on the canvas, and source pixels seen."""

    box: list[int]
    point: list[int]
    area: int


@dataclass(frozen=True)
class Clip:
    """One procedural clip as the policy sees it.

    frames: uint8 [T, S, S, 3] on the canvas; names: per object; order: object indices as the
    description lists them; seen: per frame, object index -> Item (absent when hidden).
    """

    frames: np.ndarray
    names: tuple[str, ...]
    order: tuple[int, ...]
    description: str
    seen: tuple[dict[int, Item], ...]
    queries: tuple[Query, ...]

    def union(self, query: Query, frame: int) -> int:
        """Source pixels of the query's objects seen in a frame (objects never share a pixel)."""
        return sum(self.seen[frame][i].area for i in query.targets if i in self.seen[frame])


@dataclass(frozen=True)
class Sample:
    """One question: user text, right response, frames uint8 [T, S, S, 3] (T = 1 for an image)."""

    task: str
    prompt: str
    response: str
    frames: np.ndarray


def make_clip(rng: np.random.Generator) -> Clip:
    """Draw a scene of the laptop recipe's preset and put it on the canvas.

    Every number of objects is equally frequent, so that full scenes are practised too.
    """
    preset = PRESETS[PRESET]
    count = int(rng.integers(preset.objects[0], preset.objects[1] + 1))
    scene = make_scene(rng, replace(preset, objects=(count, count)))
    frames, seen = [], []
    for t in range(FRAMES):
        frames.append(to_canvas(scene.render(t), IMAGE_CANVAS))
        masks = enumerate(scene.masks(t))
        seen.append({i: _item(mask) for i, mask in masks if mask.any()})
    return Clip(
        frames=np.stack(frames),
        names=tuple(o.name for o in scene.objects),
        order=tuple(scene.order),
        description=scene.describe(),
        seen=tuple(seen),
        queries=tuple(make_queries(rng, scene, QUERIES)),
    )


def _item(mask: np.ndarray) -> Item:
    found = ground(mask, IMAGE_CANVAS)
    return Item(list(found.bbox_2d), list(found.point_2d), int(mask.sum()))


def make_clips(seed: Sequence[int], count: int) -> list[Clip]:
    """`count` clips of the stream `[STREAM, *seed]`."""
    rng = np.random.default_rng([STREAM, *seed])
    return [make_clip(rng) for _ in range(count)]


def scene_text(clip: Clip, frame: int) -> str:
    """`Scene: red circle at [14, 28, 42, 56], blue square hidden.`, in the description's order."""
    seen = clip.seen[frame]
    parts = [
        f"{clip.names[i]} at {seen[i].box}" if i in seen else f"{clip.names[i]} hidden"
        for i in clip.order
    ]
    return f"Scene: {', '.join(parts)}."


def target_text(clip: Clip, query: Query, frame: int | None = None) -> str:
    """`Target: red circle, blue square.`, by object; with a frame, `, visible` or `, hidden`."""
    names = [clip.names[i] for i in sorted(query.targets)]
    if frame is not None:
        names.append("visible" if clip.union(query, frame) else "hidden")
    return f"Target: {', '.join(names)}."


def boxes_text(clip: Clip, targets: Sequence[int], frame: int) -> str:
    """The JSON list of the targets seen in a frame, by ascending object."""
    seen = clip.seen[frame]
    rows = [
        {"bbox_2d": seen[i].box, "point_2d": seen[i].point} for i in sorted(targets) if i in seen
    ]
    return json.dumps(rows)


def times_text(clip: Clip) -> str:
    """`Seen: red circle 0 to 7, blue square 3 to 5.`: first and last frame of each shape."""
    parts = []
    for i in clip.order:
        frames = [t for t, seen in enumerate(clip.seen) if i in seen]
        when = f"{frames[0]} to {frames[-1]}" if frames else "hidden"
        parts.append(f"{clip.names[i]} {when}")
    return f"Seen: {', '.join(parts)}."


def keyframe(clip: Clip, query: Query, without: Sequence[int] = ()) -> int:
    """The first frame whose target union is largest, among those not refused."""
    allowed = [t for t in range(len(clip.frames)) if t not in without]
    return max(allowed, key=lambda t: (clip.union(query, t), -t))


def video_sample(rng: np.random.Generator, clip: Clip, prompts: Prompts) -> Sample:
    """VDG, KFG, KFG's repetition, or when each shape is seen."""
    task = rng.choice(["vdg", "kfg", "kfg_again", "times"], p=[0.3, 0.3, 0.15, 0.25])
    query = clip.queries[rng.integers(len(clip.queries))]
    last = len(clip.frames)
    if task == "vdg":
        return Sample("vdg", prompts.vdg(last), clip.description, clip.frames)
    if task == "times":
        return Sample("times", "When is each shape seen?", times_text(clip), clip.frames)
    refused: list[int] = []
    if task == "kfg_again":
        count = int(rng.integers(1, 4))
        refused = [int(t) for t in rng.choice(last, count, replace=False)]
        text = prompts.kfg_again(query.text, last, refused, clip.description)
    else:
        text = prompts.kfg(query.text, last)
    return Sample(task, text, f"<answer>{keyframe(clip, query, refused)}</answer>", clip.frames)


_IMAGE_TASKS = {
    "scene": 0.30,
    "scene_target": 0.30,
    "target": 0.05,
    "ground": 0.10,
    "ground_query": 0.15,
    "present": 0.10,
}
"""Question -> share. Those with the longest answers teach most."""


def image_sample(rng: np.random.Generator, clip: Clip) -> Sample:
    """A perception question about one frame, in words that neither AKS nor KTG uses."""
    task = rng.choice(list(_IMAGE_TASKS), p=list(_IMAGE_TASKS.values()))
    frame = int(rng.integers(len(clip.frames)))
    query = clip.queries[rng.integers(len(clip.queries))]
    one = int(rng.integers(len(clip.names)))
    context = f"Video: {clip.description}.\n"
    asked = f"{context}Query: {query.text}.\n"
    if task == "scene":
        prompt, response = f"{context}List the shapes.", scene_text(clip, frame)
    elif task == "scene_target":
        prompt = f"{asked}List the shapes and the target."
        response = f"{scene_text(clip, frame)} {target_text(clip, query, frame)}"
    elif task == "target":
        prompt, response = f"{asked}Which shapes?", target_text(clip, query)
    elif task == "ground":
        prompt, response = f"Where is the {clip.names[one]}?", boxes_text(clip, [one], frame)
    elif task == "ground_query":
        prompt = f"{asked}Show the target."
        response = boxes_text(clip, query.targets, frame)
    else:
        prompt = f"Is the {clip.names[one]} in this frame? A: yes, B: no."
        response = "A" if one in clip.seen[frame] else "B"
    if rng.random() < 0.1:
        prompt += " Think first."
        response = f"<think>{scene_text(clip, frame)}</think>\n<answer>{response}</answer>"
    return Sample(task, prompt, response, clip.frames[frame : frame + 1])
