"""From an instance of the plan to a verl row, its image and, for SFT, its conversation.

A row is what verl's RL dataset takes: `data_source`, `prompt`, `images`, `reward_model`,
`extra_info`. Rows of SFT sets also have `messages`, prompt and response, as verl's SFT dataset
takes them. Boxes and points are in pixels of the canvas.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_pipelines.corpora import Corpus, CorpusFault, Expression, Video
from data_pipelines.geometry import ground, to_canvas
from data_pipelines.planning.row_drawing import Instance
from data_pipelines.tokens import Lengths, TokenCounter
from data_pipelines.traces.texts import Describer, FileTraces, response
from data_pipelines.traces.trace_files import Sidecar
from data_pipelines.traces.trace_filter import Acceptance
from rcot_rl.errors import InputError
from rcot_rl.protocol.parser import parse_response
from rcot_rl.protocol.prompts import Prompts, user_turn
from rcot_rl.recipe.data import has_traces
from reward_fns.components.mask_iou import clip_text

SUFFIXES = {"png": ".png", "jpeg": ".jpg"}
_ENDS = {"png": b"IEND\xaeB`\x82", "jpeg": b"\xff\xd9"}
DATA_SOURCES = {"aks": "rcot/aks", "ktg": "rcot/ktg"}


@dataclass(frozen=True)
class Row:
    """One finished row, and the file under the set's folder that holds its image."""

    columns: dict[str, Any]
    media: str
    media_sha256: str
    lengths: Lengths | None
    """In the policy's tokens, when they are counted."""


@dataclass(frozen=True)
class RowMaker:
    """Everything that rows are made of; `make` is a function of the instance alone."""

    corpora: Sequence[Corpus]
    prompts: Prompts
    describer: Describer
    traces: FileTraces | list[Sidecar] | None
    """None: no set of the recipe needs them."""
    canvas: int
    zero_target: bool
    """KTG prompts say that there may be no target."""
    embed: bool
    """Images as bytes, not as paths."""
    image_format: str = "png"
    counter: TokenCounter | None = None
    """Counts tokens; None: the policy is not here."""
    accept: Acceptance | None = None
    """Judges traces from a file; None: they are templates."""
    beside: tuple[tuple[Path, Mapping[str, str]], ...] = ()
    """Finished sets of the same build: folder, checksums."""
    clip_frames: int = 0
    """Frames of a row's clip; 0: rows have none."""
    clip_tasks: tuple[str, ...] = ("ktg",)
    """Tasks whose rows have one."""

    def try_make(self, instance: Instance, folder: Path, final: Path) -> Row | CorpusFault:
        """The row of `instance`, or why the corpus does not give it; writes its image below
        `folder`, which will become `final`. Raises InputError for texts at fault."""
        try:
            return self._make(instance, folder, final)
        except CorpusFault as fault:
            return fault

    def _make(self, instance: Instance, folder: Path, final: Path) -> Row:
        corpus = self.corpora[instance.corpus]
        video = corpus.video(instance.video)
        expression = corpus.expression(video, instance.expression_id)
        stem = video.frames[instance.frame_index]
        size = corpus.frame_size(video.id, stem)
        media = f"media/{corpus.dataset}/{video.id}/{stem}{SUFFIXES[self.image_format]}"
        encoded = self._shown_before(media, folder)
        if encoded is None:
            image = to_canvas(corpus.frame(video.id, stem), self.canvas)
            encoded = encode(image, self.image_format)
            _write(folder / media, encoded)

        truth = truth_of(instance, self.corpora, self.canvas)
        description = self.describer.description(instance.corpus, corpus.dataset, video.id)
        asked = self._ask(instance, description, expression)
        turn = {"role": "user", "content": user_turn(asked, "image")}
        columns: dict[str, Any] = {
            "data_source": DATA_SOURCES[instance.task],
            "prompt": [turn],
            "images": [
                {"bytes": encoded, "path": media} if self.embed else {"image": str(final / media)}
            ],
            "reward_model": {"style": "rule", "ground_truth": json.dumps(truth)},
            "extra_info": {
                "index": instance.index,
                "task": instance.task,
                "dataset": corpus.dataset,
                "video": video.id,
                "expression_id": expression.id,
                "expression": expression.text,
                "object_ids": list(expression.object_ids),
                "frame": stem,
                "frame_index": instance.frame_index,
                "source_size": list(size),
                "canvas": [self.canvas, self.canvas],
                "target": instance.target,
                "description": description,
                "split": instance.split,
                "media": media,
            },
        }
        if self.clip_frames:
            wanted = instance.task in self.clip_tasks
            clip = self._clip(instance, corpus, video, expression) if wanted else ""
            columns["extra_info"]["clip"] = clip
        if has_traces(instance.set_name):
            said = self._response(instance, corpus, video, expression, truth)
            columns["messages"] = [turn, {"role": "assistant", "content": said}]
        lengths = self._count(columns)
        return Row(columns, media, hashlib.sha256(encoded).hexdigest(), lengths)

    def _shown_before(self, media: str, folder: Path) -> bytes | None:
        """The picture, where this build has made it already: for another row, or another set."""
        path = folder / media
        if path.is_file():
            data = path.read_bytes()
            if data.endswith(_ENDS[self.image_format]):
                return data
        for other, files in self.beside:
            if media in files:
                data = (other / media).read_bytes()
                if hashlib.sha256(data).hexdigest() == files[media]:
                    _write(path, data)
                    return data
        return None

    def _count(self, columns: dict[str, Any]) -> Lengths | None:
        if self.counter is None:
            lengths = None
        else:
            said = columns["messages"][1]["content"] if "messages" in columns else None
            lengths = self.counter.lengths(columns["prompt"], said, self.canvas)
        names = ("vision_tokens", "prompt_tokens", "total_tokens")
        columns["extra_info"] |= dict(zip(names, lengths or (None,) * 3, strict=True))
        return lengths

    def _clip(
        self, instance: Instance, corpus: Corpus, video: Video, expression: Expression
    ) -> str:
        """Evenly spaced frames of those that are there, the shown one among them, and the targets'
        union in each."""
        there = list(range(len(video.frames)))
        chosen = _spread(there, self.clip_frames)
        if not all(corpus.has_frame(video.id, video.frames[k]) for k in chosen):
            there = [k for k in there if corpus.has_frame(video.id, video.frames[k])]
            chosen = _spread(there, self.clip_frames)
        nearest = min(chosen, key=lambda k: (abs(k - instance.frame_index), k))
        indices = sorted((chosen - {nearest}) | {instance.frame_index})
        frames = [str(corpus.frame_path(video.id, video.frames[k]).resolve()) for k in indices]
        masks = []
        for k in indices:
            objects = corpus.masks(video, expression, k)
            masks.append(np.any(list(objects.values()), axis=0))
        return clip_text(frames, indices.index(instance.frame_index), masks)

    def _ask(self, instance: Instance, description: str, expression: Expression) -> str:
        if instance.task == "aks":
            return self.prompts.aks(description, expression.text)
        return self.prompts.ktg(
            description, expression.text, zero_target=self.zero_target, canvas=self.canvas
        )

    def _response(
        self,
        instance: Instance,
        corpus: Corpus,
        video: Video,
        expression: Expression,
        truth: str | list[dict[str, list[int]]],
    ) -> str:
        if self.traces is None:
            raise ValueError("an SFT row needs traces")
        frame = instance.frame_index
        if isinstance(self.traces, FileTraces):
            stem = video.frames[frame]
            said = self.traces.response_for(instance, stem)
            causes = self.accept.answer(instance.task, said, truth) if self.accept else []
            thought = parse_response(said).thought
            if causes or thought is None:
                where = "/".join((instance.task, *instance.key[:3], stem))
                wrong = ", ".join(causes) or "no reasoning"
                raise InputError(
                    f"not fit to learn from: {wrong}", file=self.traces.path, key=where
                )
            # the answer was right within the matcher's bounds; what is learned is exact
            answer = truth if isinstance(truth, str) else json.dumps(truth)
            return response(thought, answer, self.prompts.own)
        sidecar = self.traces[instance.corpus]
        if instance.task == "aks":
            visible = instance.option == "A"
            think = sidecar.think_aks(corpus, video, expression, frame, self.canvas, visible)
            return response(think, instance.option, self.prompts.own)
        think = sidecar.think_ktg(corpus, video, expression, frame, self.canvas)
        return response(think, json.dumps(truth), self.prompts.own)


def _spread(indices: Sequence[int], most: int) -> set[int]:
    count = min(most, len(indices))
    return {indices[k] for k in np.linspace(0, len(indices) - 1, count).round().astype(int)}


def truth_of(
    instance: Instance, corpora: Sequence[Corpus], canvas: int
) -> str | list[dict[str, list[int]]]:
    """AKS: the option. KTG: box and point of every target visible in the frame, by id, in pixels of
    the canvas. Raises CorpusFault."""
    if instance.task == "aks":
        return instance.option
    corpus = corpora[instance.corpus]
    video = corpus.video(instance.video)
    expression = corpus.expression(video, instance.expression_id)
    masks = corpus.masks(video, expression, instance.frame_index)
    return [ground(mask, canvas).as_dict() for mask in masks.values() if mask.any()]


def encode(image: np.ndarray, image_format: str) -> bytes:
    """uint8 [H, W, 3] RGB as a file of one of `SUFFIXES`."""
    parameters = [cv2.IMWRITE_JPEG_QUALITY, 95]
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    suffix = SUFFIXES[image_format]
    done, data = cv2.imencode(suffix, bgr, parameters if image_format == "jpeg" else [])
    if not done:
        raise RuntimeError(f"OpenCV could not encode a {suffix}")
    return data.tobytes()


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, also when two workers write the same frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)
