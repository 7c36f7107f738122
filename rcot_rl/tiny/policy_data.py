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
from data_pipelines.toy.queries import ToyQuery, make_queries, plural
from data_pipelines.toy.scenes import COLOURS, PRESETS, SHAPES, make_scene
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.tiny.policy_model import IMAGE_CANVAS, PATCH

STREAM = 70707
"""First word of every seed of this module."""

PRESET_NAMES = ("lattice", "fleeting")
PRESET = "lattice"
FRAMES = 8
NAMES = tuple(
    f"{colour} {shape}"
    for colour in list(COLOURS)[: PRESETS[PRESET].colours]
    for shape in SHAPES[: PRESETS[PRESET].shapes]
)
QUERIES = 6
"""Expressions per clip."""


VideoQuestion = Literal["vdg", "kfg", "kfg_again", "times", "order"]
ImageQuestion = Literal[
    "scene", "select", "ground", "ground_several", "present", "compare", "count"
]
_VIDEO_TASKS: dict[VideoQuestion, float] = {
    "vdg": 0.27,
    "kfg": 0.25,
    "kfg_again": 0.15,
    "times": 0.25,
    "order": 0.08,
}
_IMAGE_TASKS: dict[ImageQuestion, float] = {
    "scene": 0.30,
    "select": 0.18,
    "ground": 0.08,
    "ground_several": 0.14,
    "present": 0.07,
    "compare": 0.13,
    "count": 0.10,
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
    cells: np.ndarray
    """See `cells_of`."""


def make_clip(rng: np.random.Generator, name: str | None = None) -> PolicyClip:
    """Draw a scene on the canvas; every number of objects is equally frequent."""
    preset = PRESETS[name or PRESET_NAMES[int(rng.integers(len(PRESET_NAMES)))]]
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


def make_clips(seed: Sequence[int], count: int, name: str = PRESET) -> list[PolicyClip]:
    """Return `count` clips of a preset with seed `[STREAM, *seed]`."""
    rng = np.random.default_rng([STREAM, *seed])
    return [make_clip(rng, name) for _ in range(count)]


def scene_text(clip: PolicyClip, frame: int, chosen: Sequence[int] | None = None) -> str:
    """Return `Scene: red circle at [14, 28, 42, 56], blue square hidden.`, in `clip.order`.

    Args:
        chosen: Object indices to list. None: all.
    """
    seen = clip.seen[frame]
    parts = [
        f"{clip.names[i]} at {seen[i].box}" if i in seen else f"{clip.names[i]} hidden"
        for i in clip.order
        if chosen is None or i in chosen
    ]
    return f"Scene: {', '.join(parts)}."


def boxes_text(clip: PolicyClip, targets: Sequence[int], frame: int) -> str:
    """Return the JSON list of the targets visible in a frame, by ascending object index."""
    seen = clip.seen[frame]
    rows = [{"bbox_2d": seen[i].box, "point_2d": seen[i].point} for i in targets if i in seen]
    return json.dumps(rows)


def times_text(clip: PolicyClip) -> str:
    """Return `Seen: red circle at [0, 7], blue square at [3, 5].`: first and last frames."""
    parts = []
    for i in clip.order:
        frames = [t for t, seen in enumerate(clip.seen) if i in seen]
        span = f"at [{frames[0]}, {frames[-1]}]" if frames else "hidden"
        parts.append(f"{clip.names[i]} {span}")
    return f"Seen: {', '.join(parts)}."


def keyframe(clip: PolicyClip, query: ToyQuery, without: Sequence[int] = ()) -> int:
    """Return the first frame with the largest target union, except frames in `without`."""
    allowed = [t for t in range(len(clip.frames)) if t not in without]
    return max(allowed, key=lambda t: (clip.union(query, t), -t))


def cells_of(clip: PolicyClip, frames: Sequence[int]) -> np.ndarray:
    """Return what each patch of the canvas shows: int64 [T, 8, 8, 7].

    The last axis, about the object whose box covers the patch's centre: name (its place in `NAMES`
    plus one; 0: background), the sides of its box in patches, rounded, the frame, and the first
    frame that shows the object. Frames are numbers within `frames`.
    """
    side = IMAGE_CANVAS // PATCH
    centres = (np.arange(side) + 0.5) * PATCH
    out = np.zeros((len(frames), side, side, 7), np.int64)
    for row, frame in enumerate(frames):
        for index, item in sorted(clip.seen[frame].items()):
            x1, y1, x2, y2 = item.box
            inside = (centres >= y1) & (centres < y2)
            across = (centres >= x1) & (centres < x2)
            sides = [round(v / PATCH) for v in item.box]
            name = NAMES.index(clip.names[index]) + 1
            first = next(n for n, t in enumerate(frames) if index in clip.seen[t])
            out[row][np.ix_(inside, across)] = [name, *sides, row, first]
    return out


def _draw_task(rng: np.random.Generator, shares: dict[Question, float]) -> Question:
    return list(shares)[rng.choice(len(shares), p=list(shares.values()))]


def video_sample(rng: np.random.Generator, clip: PolicyClip, prompts: Prompts) -> PretrainSample:
    """Draw a question about the video: VDG, KFG, its repetition, or when each shape is seen."""
    task = _draw_task(rng, _VIDEO_TASKS)
    last = len(clip.frames)

    def sample(prompt: str, response: str) -> PretrainSample:
        return PretrainSample(task, prompt, response, clip.frames, cells_of(clip, range(last)))

    if task == "vdg":
        return sample(prompts.vdg(last), clip.description)
    if task == "times":
        return sample("When is each shape seen?", times_text(clip))
    if task == "order":
        names = [clip.names[i] for i in clip.order]
        words = ["first", "second", "third", "fourth", "fifth"][: len(names)]
        if len(names) > 1:
            words[-1] = "last"
        told = ", ".join(f"{word} {name}" for word, name in zip(words, names, strict=True))
        return sample("Which shape appears when?", told)
    one = int(rng.integers(len(clip.names)))
    query = ToyQuery(f"the {clip.names[one]}", (one,), "attribute")
    if task == "kfg":
        text = prompts.kfg(query.text, last)
        return sample(text, f"<answer>{keyframe(clip, query)}</answer>")
    count = int(rng.integers(1, 5))
    refused = [int(t) for t in rng.choice(last, count, replace=False)]
    text = prompts.kfg_again(query.text, last, [(t, "") for t in refused], clip.description)
    return sample(text, f"<answer>{keyframe(clip, query, refused)}</answer>")


def image_sample(rng: np.random.Generator, clip: PolicyClip) -> PretrainSample:
    """Draw a perception question about one frame, worded unlike AKS and KTG."""
    task = _draw_task(rng, _IMAGE_TASKS)
    frame = int(rng.integers(len(clip.frames)))
    one = int(rng.integers(len(clip.names)))
    context = f"Video: {clip.description}.\n"
    target: list[str] = []
    if task == "compare" and len(clip.seen[frame]) < 2:
        task = "scene"
    if task == "scene":
        prompt, response = f"{context}List the shapes.", scene_text(clip, frame)
    elif task == "select":
        text, chosen = _draw_selection(rng, clip)
        prompt, response = f"{context}List {text}.", scene_text(clip, frame, chosen)
    elif task == "ground":
        prompt, response = f"Where is the {clip.names[one]}?", boxes_text(clip, [one], frame)
        target = [f"Target: {clip.names[one]}."]
    elif task == "ground_several":
        count = int(rng.integers(1, len(clip.names) + 1))
        some = [int(i) for i in rng.choice(len(clip.names), count, replace=False)]
        some.sort(key=clip.order.index)
        named = ", ".join(clip.names[i] for i in some)
        prompt = f"{context}Where are {named}?"
        target = [f"Target: {named}."]
        response = boxes_text(clip, some, frame)
    elif task == "compare":
        pair = [int(i) for i in rng.choice(sorted(clip.seen[frame]), 2, replace=False)]
        prompt = f"Where is the {clip.names[pair[0]]}, where is the {clip.names[pair[1]]}?"
        response = compare_text(clip, pair[0], pair[1], frame)
    elif task == "count":
        question, number = _draw_count(rng, clip, one)
        prompt, response = f"{context}How many {question}?", str(number)
    else:
        absent = rng.random() < 0.3
        name = str(rng.choice(NAMES)) if absent else clip.names[one]
        prompt = f"Is the {name} in this frame? A: yes, B: no."
        seen = {clip.names[i] for i in clip.seen[frame]}
        response = "A" if name in seen else "B"
        target = [f"Target: {name}, {'visible' if name in seen else 'hidden'}."]
    if task != "scene" and rng.random() < 0.3:
        # only the description tells which shapes are hidden
        prompt = f"{context}{prompt.removeprefix(context)} Think first."
        think = " ".join([scene_text(clip, frame), *target])
        response = f"<think>{think}</think>\n<answer>{response}</answer>"
    return PretrainSample(
        task, prompt, response, clip.frames[frame : frame + 1], cells_of(clip, [frame])
    )


def _draw_count(rng: np.random.Generator, clip: PolicyClip, one: int) -> tuple[str, int]:
    """Draw what to count: shapes like object `one` in colour or shape, all others, or all."""
    by = int(rng.integers(2))
    value = clip.names[one].split()[by]
    number = sum(name.split()[by] == value for name in clip.names)
    if rng.random() < 0.4:
        kind = plural(value) if by else value
        return f"shapes are not {kind}", len(clip.names) - number
    if rng.random() < 0.2:
        return "are all shapes", len(clip.names)
    return f"{plural(value) if by else f'{value} shapes'} are there", number


def _draw_selection(rng: np.random.Generator, clip: PolicyClip) -> tuple[str, list[int]]:
    """Draw shapes by colour, by shape, by what they are not, or by place in the description."""
    one = int(rng.integers(len(clip.names)))
    if rng.random() < 0.4:
        words = ["first", "second", "third", "fourth", "fifth"]
        place = clip.order.index(one)
        last = place == len(clip.order) - 1 and rng.random() < 0.5
        return f"the {'last' if last else words[place]} shape", [one]
    by = int(rng.integers(2))
    value = clip.names[one].split()[by]
    kind = plural(value) if by else value
    chosen = [i for i, name in enumerate(clip.names) if name.split()[by] == value]
    others = [i for i in range(len(clip.names)) if i not in chosen]
    if others and rng.random() < 0.5:
        return f"the shapes that are not {kind}", others
    return f"the {kind}" if by else f"the {kind} shapes", chosen


def compare_text(clip: PolicyClip, one: int, other: int, frame: int) -> str:
    """Return `Scene: red circle left of blue square.`, or `right of`, `above` or `below`."""

    def middle(index: int) -> tuple[int, int]:
        x1, y1, x2, y2 = clip.seen[frame][index].box
        return x1 + x2, y1 + y2

    (x, y), (other_x, other_y) = middle(one), middle(other)
    if x != other_x:
        word = "left of" if x < other_x else "right of"
    else:
        word = "above" if y < other_y else "below"
    return f"Scene: {clip.names[one]} {word} {clip.names[other]}."
