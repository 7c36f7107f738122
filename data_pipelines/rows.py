"""Make verl rows, with image and SFT conversation, from the instances of the sampling plan.

A row has the columns of verl's RL dataset: `data_source`, `prompt`, `images`, `reward_model`,
`extra_info`. Rows of SFT sets also have `messages` (prompt and response), as verl's SFT dataset
reads them. Boxes and points are in canvas pixels.
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
from data_pipelines.traces.texts import Describer, FileTraces, answer_block, response
from data_pipelines.traces.toy_templates import Sidecar
from data_pipelines.traces.trace_filter import TraceFilter
from rcot_rl.errors import InputError
from rcot_rl.protocol.parser import ResponseForm, parse_response
from rcot_rl.protocol.prompts import Prompts, user_turn
from rcot_rl.protocol.row_clips import clip_text
from rcot_rl.recipe.data_section import has_traces
from rcot_rl.recipe.schema import DATA_SOURCES

SUFFIXES = {"png": ".png", "jpeg": ".jpg"}
"""`data.image_format` -> suffix of the file."""
_END_MARKERS = {"png": b"IEND\xaeB`\x82", "jpeg": b"\xff\xd9"}
Truth = str | list[dict[str, list[int]]]
"""Ground truth of a row: the option (AKS), or boxes and points in canvas pixels (KTG)."""


@dataclass(frozen=True)
class ShardRow:
    """One finished row, and its image file relative to the set's folder."""

    columns: dict[str, Any]
    media: str
    media_sha256: str
    lengths: Lengths | None
    """Token counts; None if the policy's tokenizer is not available."""


@dataclass(frozen=True)
class RowMaker:
    """Makes rows; the result of `try_make` depends on the instance alone."""

    corpora: Sequence[Corpus]
    prompts: Prompts
    describer: Describer
    traces: FileTraces | list[Sidecar] | None
    """None if no row has reasoning and no file of traces decides which instances are used."""
    canvas: int
    zero_target: bool
    """KTG prompts say that there may be no target."""
    embed: bool
    """Store images as bytes, not as paths."""
    image_format: str = "png"
    counter: TokenCounter | None = None
    """None if the policy's tokenizer is not available."""
    response: ResponseForm = "think_answer"
    """What the responses of SFT rows hold."""
    trace_filter: TraceFilter | None = None
    """Checks the answers of traces from a file; None for templates."""
    beside: tuple[tuple[Path, Mapping[str, str]], ...] = ()
    """Finished sets of the same build that can share images: folder, checksums."""
    clip_frames: int = 0
    """Frames of a row's clip; 0 if rows have no clip."""
    clip_tasks: tuple[str, ...] = ("ktg",)
    """Tasks whose rows have a clip."""

    def try_make(self, instance: Instance, folder: Path, final: Path) -> ShardRow | CorpusFault:
        """Make the row of `instance` and write its image below `folder`. Raises InputError.

        Args:
            folder: The set's build folder.
            final: The name that `folder` will be renamed to; stored paths begin with it.

        Returns:
            The row, or the defect of the corpus that prevents it.
        """
        try:
            return self._make(instance, folder, final)
        except CorpusFault as fault:
            return fault

    def _make(self, instance: Instance, folder: Path, final: Path) -> ShardRow:
        corpus = self.corpora[instance.corpus]
        video = corpus.video(instance.video)
        expression = corpus.expression(video, instance.expression_id)
        stem = video.frames[instance.frame_index]
        size = corpus.frame_size(video.id, stem)
        media = f"media/{corpus.dataset}/{video.id}/{stem}{SUFFIXES[self.image_format]}"
        encoded = self._finished_image(media, folder)
        if encoded is None:
            image = to_canvas(corpus.frame(video.id, stem), self.canvas)
            encoded = encode(image, self.image_format)
            _write(folder / media, encoded)

        truth = truth_of(instance, self.corpora, self.canvas)
        description = self.describer.description(instance.corpus, corpus.dataset, video.id)
        prompt = self._prompt(instance, description, expression)
        turn = {"role": "user", "content": user_turn(prompt, "image")}
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
            has_clip = instance.task in self.clip_tasks
            clip = self._clip(instance, corpus, video, expression) if has_clip else ""
            columns["extra_info"]["clip"] = clip
        if has_traces(instance.set_name):
            answer = self._response(instance, corpus, video, expression, truth)
            columns["messages"] = [turn, {"role": "assistant", "content": answer}]
        lengths = self._count(columns)
        return ShardRow(columns, media, hashlib.sha256(encoded).hexdigest(), lengths)

    def _finished_image(self, media: str, folder: Path) -> bytes | None:
        """Return the image if another row or set of this build has already encoded it."""
        path = folder / media
        if path.is_file():
            data = path.read_bytes()
            if data.endswith(_END_MARKERS[self.image_format]):
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
            answer = columns["messages"][1]["content"] if "messages" in columns else None
            lengths = self.counter.lengths(columns["prompt"], answer, self.canvas)
        names = ("vision_tokens", "prompt_tokens", "total_tokens")
        columns["extra_info"] |= dict(zip(names, lengths or (None,) * 3, strict=True))
        return lengths

    def _clip(
        self, instance: Instance, corpus: Corpus, video: Video, expression: Expression
    ) -> str:
        """Return the row's clip: evenly spaced existing frames, the row's frame among them, with
        the union of the targets' masks in each."""
        available = list(range(len(video.frames)))
        chosen = _spread(available, self.clip_frames)
        if not all(corpus.has_frame(video.id, video.frames[k]) for k in chosen):
            available = [k for k in available if corpus.has_frame(video.id, video.frames[k])]
            chosen = _spread(available, self.clip_frames)
        nearest = min(chosen, key=lambda k: (abs(k - instance.frame_index), k))
        indices = sorted((chosen - {nearest}) | {instance.frame_index})
        frames = [str(corpus.frame_path(video.id, video.frames[k]).resolve()) for k in indices]
        masks = []
        for k in indices:
            objects = corpus.masks(video, expression, k)
            masks.append(np.any(list(objects.values()), axis=0))
        return clip_text(frames, indices.index(instance.frame_index), masks)

    def _prompt(self, instance: Instance, description: str, expression: Expression) -> str:
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
        truth: Truth,
    ) -> str:
        if self.response == "answer":
            return answer_block(truth if isinstance(truth, str) else json.dumps(truth))
        if self.traces is None:
            raise ValueError("rows of an SFT set need traces")
        frame = instance.frame_index
        if isinstance(self.traces, FileTraces):
            stem = video.frames[frame]
            trace = self.traces.response_for(instance, stem)
            task = instance.task
            causes = self.trace_filter.check_answer(task, trace, truth) if self.trace_filter else []
            thought = parse_response(trace).thought
            if causes or thought is None:
                reasons = ", ".join(causes) or "no reasoning"
                raise InputError(
                    f"the trace is refused: {reasons}; run `rcot data trace` again",
                    file=self.traces.path,
                    key="/".join((task, *instance.key[:3], stem)),
                )
            # the trace's answer is right within the matcher's tolerance; the row's is exact
            answer = truth if isinstance(truth, str) else json.dumps(truth)
            return response(thought, answer, self.prompts.extra_tokens)
        sidecar = self.traces[instance.corpus]
        if instance.task == "aks":
            visible = instance.option == "A"
            think = sidecar.think_aks(corpus, video, expression, frame, self.canvas, visible)
            return response(think, instance.option, self.prompts.extra_tokens)
        think = sidecar.think_ktg(corpus, video, expression, frame, self.canvas)
        return response(think, json.dumps(truth), self.prompts.extra_tokens)


def _spread(indices: Sequence[int], most: int) -> set[int]:
    count = min(most, len(indices))
    return {indices[k] for k in np.linspace(0, len(indices) - 1, count).round().astype(int)}


def truth_of(instance: Instance, corpora: Sequence[Corpus], canvas: int) -> Truth:
    """Return the ground truth of a row. Raises CorpusFault.

    Returns:
        AKS: the option. KTG: box and point of every target visible in the frame, by object id, in
        canvas pixels.
    """
    if instance.task == "aks":
        return instance.option
    corpus = corpora[instance.corpus]
    video = corpus.video(instance.video)
    expression = corpus.expression(video, instance.expression_id)
    masks = corpus.masks(video, expression, instance.frame_index)
    return [ground(mask, canvas).as_dict() for mask in masks.values() if mask.any()]


def encode(image: np.ndarray, image_format: str) -> bytes:
    """Encode uint8 [H, W, 3] RGB in one of the formats of `SUFFIXES`."""
    parameters = [cv2.IMWRITE_JPEG_QUALITY, 95]
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    suffix = SUFFIXES[image_format]
    ok, data = cv2.imencode(suffix, bgr, parameters if image_format == "jpeg" else [])
    if not ok:
        raise RuntimeError(f"OpenCV could not encode a {suffix}")
    return data.tobytes()


def _write(path: Path, data: bytes) -> None:
    """Write atomically, also when two workers write the same frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)
