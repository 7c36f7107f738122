"""Agentic AKS in the rollout: verl's multi-trajectory agent loop plays `agentic.Episode`.

Each turn (a judgement on an image, a re-selection on the clip) is a sequence of its own, with its
own media, as at inference, where no turn sees the one before. verl takes them as the outputs of one
session: the last one is scored, and all of them get its advantage. The last judgement is put last,
for it is the one that the reward reads; the outcome goes along in `extra_fields`.

A group's first judgement is shared as in the single-turn loop; what comes after differs between
responses and is not.
"""

from __future__ import annotations

import asyncio
from typing import Any

import cv2
import numpy as np
import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register

from data_pipelines.geometry import to_canvas
from rcot_rl.errors import InputError
from rcot_rl.protocol.keyframes import video_metadata
from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.training.agent_loop import _GROUP, CachedSingleTurn
from rcot_rl.training.agentic import Episode, read_clip
from rcot_rl.training.reward_manager import OUTCOME


@register("rcot_agentic_aks")
class AgenticAks(CachedSingleTurn):
    """`grpo.agent: agentic-aks`; its settings are `trainer.rcot.agentic` of verl's config."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.config.trainer.rcot.agentic
        self._rounds, self._fps = int(settings.rounds), float(settings.fps)
        self._image_canvas, self._video_canvas = settings.image_canvas, settings.video_canvas
        self._prompts = load_prompts(settings.prompts, self.own_tokens)
        self._clip_kwargs: dict[str, Any] | None = None
        """For the processors of engine and trainer alike, in a turn that shows the clip."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> list[AgentLoopOutput]:
        """One episode's turns, the last judgement last. InputError for a row without a clip."""
        info = kwargs["extra_info"]
        episode = Episode(read_clip(info), self._rounds)
        judgement = await super().run(sampling_params, **kwargs)
        turns = [judgement]
        while episode.verdict(await self._text(judgement)):
            again = await self._own(sampling_params, kwargs, await self._clip_turn(episode, info))
            turns.append(again)
            if not episode.selection(await self._text(again)):
                break
            judgement = await self._own(
                sampling_params, kwargs, await self._image_turn(episode, info)
            )
            turns.append(judgement)
        turns.remove(judgement)
        turns.append(judgement)
        for turn in turns:
            turn.num_turns = 2 * len(turns)
            turn.extra_fields[OUTCOME] = episode.outcome()
        return turns

    async def _own(
        self, sampling_params: dict[str, Any], kwargs: dict[str, Any], message: dict[str, Any]
    ) -> AgentLoopOutput:
        """A turn that the group does not share."""
        token = _GROUP.set(None)
        video = message["content"][0].get("video")
        if video is not None:
            # verl's pairs of frames and metadata lose the metadata in vLLM, for this model
            metadata = [video_metadata(len(video), self._fps)]
            self._clip_kwargs = {"video_metadata": metadata, "do_sample_frames": False}
        try:
            return await super().run(sampling_params, **(kwargs | {"raw_prompt": [message]}))
        finally:
            self._clip_kwargs = None
            _GROUP.reset(token)

    def _get_mm_processor_kwargs(self, audios: Any = None) -> dict[str, Any]:
        return self._clip_kwargs or super()._get_mm_processor_kwargs(audios)

    async def process_multi_modal_info(self, messages: list[dict]) -> dict:
        """Frames of ours as they are: verl's own reading would resize small ones."""
        for part in messages[0]["content"]:
            if isinstance(part, dict) and isinstance(part.get("video"), np.ndarray):
                frames = torch.from_numpy(part["video"]).permute(0, 3, 1, 2)
                return {"videos": [(frames, video_metadata(len(frames), self._fps))]}
        return await super().process_multi_modal_info(messages)

    async def _image_turn(self, episode: Episode, info: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image

        path = episode.clip.frames[episode.candidate]
        shown = await asyncio.to_thread(_frame, path, self._image_canvas)
        text = self._prompts.aks(info["description"], info["expression"])
        return _message({"type": "image", "image": Image.fromarray(shown)}, text)

    async def _clip_turn(self, episode: Episode, info: dict[str, Any]) -> dict[str, Any]:
        frames = episode.clip.frames
        shown = await asyncio.to_thread(
            lambda: np.stack([_frame(path, self._video_canvas) for path in frames])
        )
        refused = list(dict.fromkeys(episode.refused))
        text = self._prompts.kfg_again(
            info["expression"], len(frames), refused, info["description"]
        )
        return _message({"type": "video", "video": shown}, text)

    async def _text(self, output: AgentLoopOutput) -> str:
        return await asyncio.to_thread(
            self.tokenizer.decode, output.response_ids, skip_special_tokens=True
        )


def _message(media: dict[str, Any], text: str) -> dict[str, Any]:
    return {"role": "user", "content": [media, {"type": "text", "text": text}]}


def _frame(path: str, canvas: int) -> np.ndarray:
    """uint8 [canvas, canvas, 3] RGB."""
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        raise InputError("not a readable image", file=path)
    return to_canvas(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), canvas)
