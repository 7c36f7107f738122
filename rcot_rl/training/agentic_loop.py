"""Agentic AKS in the rollout: verl's multi-trajectory agent loop plays the episodes of `agentic`.

Each turn (a judgement on an image, a re-selection on the clip) is a separate sequence with its own
media, as at inference, where no turn sees the previous one. verl treats them as the outputs of one
session: it scores the last one, and gives its advantage to all. The last judgement comes last,
because the reward reads it; the outcome is in `extra_fields`.

The prompt of the first judgement is shared by the group, as in the single-turn loop. Later prompts
differ between responses.
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
from rcot_rl.protocol.keyframe_selection import KeyframeSelection
from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.protocol.row_clips import RowClip, read_row_clip, video_metadata
from rcot_rl.training.agentic import episode_outcome, play_episode, start_selection
from rcot_rl.training.cached_agent_loop import _GROUP, CachedSingleTurn
from rcot_rl.training.reward_manager import OUTCOME


@register("rcot_agentic_aks")
class AgenticAks(CachedSingleTurn):
    """The loop of `grpo.agent: agentic-aks`; settings: `trainer.rcot.agentic` of verl's config."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Read the settings and load the prompts; arguments as of verl's loop."""
        super().__init__(*args, **kwargs)
        settings = self.config.trainer.rcot.agentic
        self._rounds, self._fps = int(settings.rounds), float(settings.fps)
        self._image_canvas, self._video_canvas = settings.image_canvas, settings.video_canvas
        self._prompts = load_prompts(settings.prompts, self.own_tokens)
        self._clip_kwargs: dict[str, Any] | None = None
        """Processor arguments of engine and trainer, during a turn that shows the clip."""

    async def run(  # type: ignore[override]  # verl accepts a list, but does not annotate it
        self, sampling_params: dict[str, Any], **kwargs: Any
    ) -> list[AgentLoopOutput]:
        """Return one episode's turns, the last judgement last. Raises InputError."""
        clip = read_row_clip(
            kwargs["extra_info"],
            needs="areas",
            hint="the agentic loop needs shards with data.clip_frames and clip_tasks: [aks]",
        )
        selection = start_selection(clip, self._rounds)

        async def take_turn(selection: KeyframeSelection) -> tuple[AgentLoopOutput, str]:
            output = await self._turn(selection, clip, sampling_params, kwargs)
            return output, await self._text(output)

        turns = await play_episode(selection, take_turn)
        for turn in turns:
            turn.num_turns = 2 * len(turns)
            turn.extra_fields[OUTCOME] = dict(episode_outcome(selection, clip.areas))
        return turns

    async def _turn(
        self,
        selection: KeyframeSelection,
        clip: RowClip,
        sampling_params: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> AgentLoopOutput:
        """Generate the turn that `selection.next_task` asks for."""
        if selection.judged is None:
            return await super().run(sampling_params, **kwargs)
        show = self._image_turn if selection.next_task == "aks" else self._clip_turn
        message = await show(selection, clip, kwargs["extra_info"])
        return await self._run_unshared(sampling_params, kwargs, message)

    async def _run_unshared(
        self, sampling_params: dict[str, Any], kwargs: dict[str, Any], message: dict[str, Any]
    ) -> AgentLoopOutput:
        """Generate a turn whose prompt the group does not share."""
        token = _GROUP.set(None)
        video = message["content"][0].get("video")
        if video is not None:
            # for this model, vLLM drops the metadata of verl's (frames, metadata) pairs
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
        """Pass our frames unchanged: verl's own reader would resize small ones."""
        for part in messages[0]["content"]:
            if isinstance(part, dict) and isinstance(part.get("video"), np.ndarray):
                frames = torch.from_numpy(part["video"]).permute(0, 3, 1, 2)
                return {"videos": [(frames, video_metadata(len(frames), self._fps))]}
        return await super().process_multi_modal_info(messages)

    async def _image_turn(
        self, selection: KeyframeSelection, clip: RowClip, info: dict[str, Any]
    ) -> dict[str, Any]:
        from PIL import Image

        path = clip.frames[selection.candidate]
        shown = await asyncio.to_thread(_frame, path, self._image_canvas)
        text = self._prompts.aks(info["description"], info["expression"])
        return _message({"type": "image", "image": Image.fromarray(shown)}, text)

    async def _clip_turn(
        self, selection: KeyframeSelection, clip: RowClip, info: dict[str, Any]
    ) -> dict[str, Any]:
        shown = await asyncio.to_thread(
            lambda: np.stack([_frame(path, self._video_canvas) for path in clip.frames])
        )
        text = self._prompts.kfg_again(
            info["expression"],
            len(selection.shown),
            selection.refused_positions(),
            info["description"],
        )
        return _message({"type": "video", "video": shown}, text)

    async def _text(self, output: AgentLoopOutput) -> str:
        tokenizer: Any = self.tokenizer
        return await asyncio.to_thread(
            tokenizer.decode, output.response_ids, skip_special_tokens=True
        )


def _message(media: dict[str, Any], text: str) -> dict[str, Any]:
    return {"role": "user", "content": [media, {"type": "text", "text": text}]}


def _frame(path: str, canvas: int) -> np.ndarray:
    """Return uint8 `[canvas, canvas, 3]` RGB."""
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        raise InputError("not a readable image", file=path)
    return to_canvas(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), canvas)
