"""The cached agent loop: media decoded once and the processor run once per group, whatever n.

verl 0.9.1 does both anew for every response of a group, and the processor three times (to build the
prompt, before the reward call and before the hand-over to TransferQueue): n = 8 takes 8 decodes and
24 runs. The responses of a group share their prompt, so here the first one decodes and runs the
processor, and the others wait for it and take the same tensors. Batches are identical.

`CachedAgentLoopManager` is verl's `agent_loop_manager_class`; `CachedSingleTurn` is registered as
`rcot_single_turn`. What a group shares is dropped when its last response is done.

Placeholders of images and videos are never sampled (`placeholder_ids`), and control tokens in a
prompt's text are neutralized, as at inference.

Left out: sharing between the epochs of a run, and between the copies in TransferQueue.
"""

from __future__ import annotations

import asyncio
import contextvars
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray
import torch
from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.tokenizer import get_processor_token_id

from rcot_rl.protocol.control_tokens import neutralize, own_tokens

_VerlWorker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class


@dataclass
class Group:
    """What the responses to one prompt have in common."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    media: dict[str, Any] | None = None
    """Decoded images and videos, as verl's dataset returns them."""
    prompt_ids: list[int] | None = None
    processed: dict[str, Any] | None = None
    """The processor's features of `media` (pixel values, grids), without any text's."""


_GROUP: contextvars.ContextVar[Group | None] = contextvars.ContextVar("group", default=None)
"""The group of the response that the current asyncio task makes."""


@register("rcot_single_turn")
class CachedSingleTurn(SingleTurnAgentLoop):
    """verl's single-turn loop on its group's shared media and prompt."""

    @cached_property
    def own_tokens(self) -> tuple[str, ...]:
        """Control tokens of the policy's tokenizer that the static pattern does not know."""
        return own_tokens(self.tokenizer.added_tokens_decoder.values())

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        """verl's, but no response holds a placeholder of an image or a video, and no text of the
        prompt a control token."""
        bias = sampling_params.get("logit_bias") or {}
        banned = dict.fromkeys(placeholder_ids(self.processor), float("-inf"))
        kwargs["raw_prompt"] = [neutral_message(m, self.own_tokens) for m in kwargs["raw_prompt"]]
        return await super().run(sampling_params | {"logit_bias": {**bias, **banned}}, **kwargs)

    async def process_multi_modal_info(self, messages: list[dict]) -> dict:
        """Decoded once per group."""
        group = _GROUP.get()
        if group is None:
            return await super().process_multi_modal_info(messages)
        async with group.lock:
            if group.media is None:
                group.media = await super().process_multi_modal_info(messages)
        return dict(group.media)

    async def ct_build_initial_tokens(
        self, messages: list[dict], mm_inputs_out: dict[str, Any] | None = None, **media: Any
    ) -> list[int]:
        """Tokenised, and its media processed, once per group."""
        group = _GROUP.get()
        if group is None:
            return await super().ct_build_initial_tokens(
                messages, mm_inputs_out={} if mm_inputs_out is None else mm_inputs_out, **media
            )
        async with group.lock:
            if group.prompt_ids is None:
                found: dict[str, Any] = {}
                group.prompt_ids = await super().ct_build_initial_tokens(
                    messages, mm_inputs_out=found, **media
                )
                group.processed = found
        if mm_inputs_out is not None:
            mm_inputs_out.update(group.processed or {})
        return list(group.prompt_ids)


def neutral_message(message: dict[str, Any], own: tuple[str, ...]) -> dict[str, Any]:
    """Return the message with the control tokens of its text parts neutralized.

    own: further control tokens of the policy's tokenizer.
    """
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": neutralize(content, own, keep_tags=True)}
    parts = [
        {**part, "text": neutralize(part["text"], own, keep_tags=True)}
        if isinstance(part, dict) and part.get("type") == "text"
        else part
        for part in content
    ]
    return {**message, "content": parts}


def placeholder_ids(processor: Any) -> list[int]:
    """Tokens that stand for pieces of images and videos in a prompt.

    vLLM would sample them like any other. In a response, there is no picture behind one: positions
    cannot be computed, and the group is lost, or the trainer's forward pass ends the stage. The
    marks around a picture are harmless: transformers goes by the placeholders alone.
    """
    if processor is None:
        return []
    found = (get_processor_token_id(processor, kind) for kind in ("image", "video"))
    return [token for token in found if token is not None]


class CachedAgentLoopWorkerTQ(_VerlWorker):
    """verl's worker; every prompt's responses run as one `Group`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from rcot_rl.training import agentic_loop  # noqa: F401  registers its loop

        super().__init__(*args, **kwargs)

    async def _run_prompt(self, prompt: dict, *args: Any, **kwargs: Any) -> None:
        # the tasks of the responses copy this task's context, and the group with it
        _GROUP.set(Group())
        try:
            await super()._run_prompt(prompt, *args, **kwargs)
        finally:
            _GROUP.set(None)

    async def _compute_score(self, outputs: list[Any], kwargs: dict) -> None:
        """Of a session's sequences only the last is scored; verl would pad them all together, which
        fails for positions of several axes (M-RoPE) as soon as lengths differ."""
        await super()._compute_score(outputs[-1:], kwargs)

    def _compute_multi_modal_inputs(
        self, output: Any, input_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The group's features; verl's own computation where a response has media of its own."""
        group = _GROUP.get()
        if group is None or group.processed is None or not _shares_media(output, group):
            return super()._compute_multi_modal_inputs(output, input_ids)
        return features(group.processed)


def features(processed: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What verl's `_compute_multi_modal_inputs` makes of a processor's output.

    A new dictionary of shared tensors: verl takes entries out of it.
    """
    inputs = {k: v for k, v in processed.items() if k not in ("input_ids", "attention_mask")}
    grid = inputs.get("image_grid_thw")
    if grid is not None:
        inputs["images_seqlens"] = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
    return inputs


def _shares_media(output: Any, group: Group) -> bool:
    own, shared = output.multi_modal_data or {}, group.media or {}
    return own.keys() == shared.keys() and all(own[key] is shared[key] for key in own)


class CachedAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager with workers of `CachedAgentLoopWorkerTQ`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(CachedAgentLoopWorkerTQ)
