"""Template descriptions and reasoning for toy corpora, whose scenes are fully known.

A toy corpus has a `toy.json` at its root:

    {"videos": {VIDEO: {"description": str, "objects": {OBJECT: {"name": str}}, "order": [OBJECT]}}}

The reasoning names the place of every object in the frame and then the target, as the paper's
traces do (section 3.4: scene, target, answer). Corpora of real clips need traces by a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.corpora import Corpus, CorpusFault, Expression, Video
from data_pipelines.corpora.json_node import Node, read_json
from data_pipelines.geometry import box_on_canvas
from rcot_rl.errors import InputError


@dataclass(frozen=True)
class ToyVideo:
    """The sidecar's entry of one clip."""

    description: str
    names: Mapping[str, str]
    """Object id -> its name in sentences."""
    order: tuple[str, ...]
    """Object ids in the order in which the scene sentence names them."""
    annos: Mapping[str, str]
    """Object id -> annotation id, where the layout needs one for unnamed objects."""


@dataclass(frozen=True)
class Sidecar:
    """The toy.json of one corpus."""

    path: Path
    videos: Mapping[str, ToyVideo]
    digest: str

    @classmethod
    def read(cls, path: Path) -> Sidecar:
        """Read toy.json; InputError with the key if it is invalid."""
        top = Node(read_json(path), path)
        videos = {name: _toy_video(node) for name, node in top["videos"].items()}
        return cls(path, videos, hashlib.sha256(path.read_bytes()).hexdigest())

    def video(self, video_id: str) -> ToyVideo:
        """Return a clip's entry; InputError if there is none."""
        if video_id not in self.videos:
            raise InputError("missing key", file=self.path, key=f"videos.{video_id}")
        return self.videos[video_id]

    def description(self, video_id: str) -> str:
        """Return the clip's description."""
        return self.video(video_id).description

    def scene(self, corpus: Corpus, video: Video, frame_index: int, canvas: int) -> str:
        """Return the scene with boxes in canvas pixels: `red circle at [14, 28, 42, 56], …`.

        Leaves out objects whose mask is defective (the scan lists them in the manifest).
        """
        toy = self.video(video.id)
        size = corpus.frame_size(video.id, video.frames[frame_index])
        parts = []
        for object_id in toy.order:
            anno = corpus.anno_id(video, object_id) or toy.annos.get(object_id)
            if anno is None:
                raise InputError(
                    "no expression names this object, so it needs an 'anno_id'",
                    file=self.path,
                    key=f"videos.{video.id}.objects.{object_id}",
                )
            try:
                box = corpus.object_box(video, anno, frame_index, size)
            except CorpusFault:
                continue
            place = "hidden" if box is None else f"at {list(box_on_canvas(box, size, canvas))}"
            parts.append(f"{toy.names[object_id]} {place}")
        return ", ".join(parts)

    def target(self, video_id: str, objects: Sequence[str]) -> str:
        """Return the names of the targets, in the order of their ids; `none` without targets."""
        names = self.video(video_id).names
        missing = next((o for o in objects if o not in names), None)
        if missing is not None:
            key = f"videos.{video_id}.objects.{missing}"
            raise InputError("missing key", file=self.path, key=key)
        return ", ".join(names[o] for o in objects) or "none"

    def think_ktg(
        self, corpus: Corpus, video: Video, expression: Expression, frame: int, canvas: int
    ) -> str:
        """Return the reasoning before boxes and points."""
        scene = self.scene(corpus, video, frame, canvas)
        return f"Scene: {scene}. Target: {self.target(video.id, expression.object_ids)}."

    def think_aks(
        self,
        corpus: Corpus,
        video: Video,
        expression: Expression,
        frame: int,
        canvas: int,
        visible: bool,
    ) -> str:
        """Return the reasoning before option A (visible) or B (hidden)."""
        scene = self.scene(corpus, video, frame, canvas)
        target = self.target(video.id, expression.object_ids)
        return f"Scene: {scene}. Target: {target}, {'visible' if visible else 'hidden'}."


def _toy_video(node: Node) -> ToyVideo:
    objects = dict(node["objects"].items())
    order = tuple(o.identifier() for o in node["order"].elements())
    for object_id in order:
        if object_id not in objects:
            node["order"].refuse(f"names the unknown object {object_id}")
    return ToyVideo(
        description=node["description"].of(str),
        names={o: n["name"].of(str) for o, n in objects.items()},
        order=order,
        annos={o: n["anno_id"].identifier() for o, n in objects.items() if "anno_id" in n},
    )
