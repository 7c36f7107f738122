"""The cached agent loop: media are decoded, and the processor runs, once per group.

verl 0.9.1 repeats both for every response of a group, and runs the processor three times per
response (to build the prompt, before the reward call, and before the batch goes to TransferQueue):
8 decodes and 24 processor runs for n = 8. The responses of a group share their prompt, so here the
first one decodes and runs the processor, and the others wait and use the same tensors. Batches are
identical to verl's.

`CachedAgentLoopManager` is verl's `agent_loop_manager_class`; `CachedSingleTurn` is registered as
`rcot_single_turn`. The shared data of a group is dropped when its last response is done.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import hydra
import ray
import torch
from verl.experimental.agent_loop import agent_loop
from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.utils.tokenizer import get_processor_token_id

from rcot_rl.protocol.control_tokens import extra_control_tokens, neutralize
from rcot_rl.training import verl_patches

_ray_worker: Any = agent_loop_tq.AgentLoopWorkerTQ
_VerlWorker: Any = _ray_worker.__ray_metadata__.modified_class


@dataclass
class Group:
    """Data shared by the responses to one prompt."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    media: dict[str, Any] | None = None
    """Decoded images and videos, as verl's dataset returns them."""
    prompt_ids: list[int] | None = None
    processed: dict[str, Any] | None = None
    """The processor's features of `media` (pixel values, grids), without those of the text."""
    rows: list[tuple[str, dict, dict]] = field(default_factory=list)
    """Key, fields and tag of each finished sequence that is not yet in TransferQueue."""


_GROUP: contextvars.ContextVar[Group | None] = contextvars.ContextVar("group", default=None)
"""The group of the response that the current asyncio task generates."""


@register("rcot_single_turn")
class CachedSingleTurn(SingleTurnAgentLoop):
    """verl's single-turn loop with its group's media and prompt."""

    tokenizer: Any

    @cached_property
    def own_tokens(self) -> tuple[str, ...]:
        """Control tokens of the policy's tokenizer that the static pattern does not know."""
        return extra_control_tokens(self.tokenizer.added_tokens_decoder.values())

    @cached_property
    def quiet(self) -> dict[str, Any]:
        """Sampling parameters that spare the engine's work for text and partial outputs."""
        return quiet_outputs(self.config)

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        """Generate one response, as verl does.

        The response never has a placeholder of an image or a video, and control tokens in the
        prompt's text are neutralized. The engine returns token ids once, at the end.
        """
        bias = sampling_params.get("logit_bias") or {}
        banned = dict.fromkeys(placeholder_ids(self.processor), float("-inf"))
        sampling_params = self.quiet | sampling_params
        kwargs["raw_prompt"] = [neutral_message(m, self.own_tokens) for m in kwargs["raw_prompt"]]
        return await super().run(sampling_params | {"logit_bias": {**bias, **banned}}, **kwargs)

    async def process_multi_modal_info(self, messages: list[dict]) -> dict:
        """Return the messages' decoded media, decoded once per group."""
        group = _GROUP.get()
        if group is None:
            return await super().process_multi_modal_info(messages)
        async with group.lock:
            if group.media is None:
                group.media = await super().process_multi_modal_info(messages)
        return dict(group.media)

    async def ct_build_initial_tokens(self, *args: Any, **kwargs: Any) -> list[int]:
        """Return the prompt's tokens, tokenized once per group.

        Args:
            args: As in verl: the messages, and their media.
            kwargs: The same by name, and the dictionary `mm_inputs_out`, which receives the
                processor's features.
        """
        group, features_out = _GROUP.get(), kwargs.get("mm_inputs_out")
        if group is None:
            kwargs["mm_inputs_out"] = {} if features_out is None else features_out
            return await super().ct_build_initial_tokens(*args, **kwargs)
        async with group.lock:
            if group.prompt_ids is None:
                processed: dict[str, Any] = {}
                kwargs["mm_inputs_out"] = processed
                group.prompt_ids = await super().ct_build_initial_tokens(*args, **kwargs)
                group.processed = processed
        if features_out is not None:
            features_out.update(group.processed or {})
        return list(group.prompt_ids)


def quiet_outputs(config: Any) -> dict[str, Any]:
    """Return vLLM's sampling parameters for outputs that are read once, as token ids.

    By default vLLM decodes each new token, and each token with a log-probability, to text, and
    wakes the waiting request at every token. verl reads only the last output's ids.

    Args:
        config: verl's complete configuration.
    """
    from vllm.sampling_params import RequestOutputKind

    if not config.trainer.rcot.get("final_outputs"):
        return {}
    if config.trainer.v1.trainer_mode not in ("sync", "rcot_sync"):
        # verl's asynchronous trainer waits for the first token before it interrupts a response
        return {"detokenize": False}
    return {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}


def neutral_message(message: dict[str, Any], extra_tokens: tuple[str, ...]) -> dict[str, Any]:
    """Return the message with the control tokens of its text parts neutralized."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": neutralize(content, extra_tokens, keep_tags=True)}
    parts = [
        {**part, "text": neutralize(part["text"], extra_tokens, keep_tags=True)}
        if isinstance(part, dict) and part.get("type") == "text"
        else part
        for part in content
    ]
    return {**message, "content": parts}


def instantiate_loop(config: Mapping[str, Any], **arguments: Any) -> Any:
    """Build an agent loop as `hydra.utils.instantiate` does.

    hydra merges the arguments, verl's whole configuration among them, into a copy of `config`. For
    a loop without settings of its own, this takes longer than the rest of a short response.
    """
    if set(config) != {"_target_"}:
        return hydra.utils.instantiate(config=config, **arguments)
    return hydra.utils.get_class(config["_target_"])(**arguments)


_DIRECT = SimpleNamespace(utils=SimpleNamespace(instantiate=instantiate_loop))
"""What verl's agent loop uses of hydra."""


def placeholder_ids(processor: Any) -> list[int]:
    """Return the ids of the tokens that stand for patches of images and videos in a prompt.

    vLLM would sample them like any other token. In a response they have no image, so positions
    cannot be computed and the group is lost, or the trainer's forward pass fails and ends the
    stage. The tokens around an image are harmless: transformers uses only the placeholders.
    """
    if processor is None:
        return []
    ids = (get_processor_token_id(processor, kind) for kind in ("image", "video"))
    return [token for token in ids if token is not None]


class GroupedQueue:
    """TransferQueue's module for verl's worker, with one put per group instead of per response.

    Nobody reads a group's sequences before its prompt has a final status. They are collected, and
    put right before the next status.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    async def async_kv_batch_put(
        self, keys: list[str], fields: list[dict], tags: list[dict], partition_id: str
    ) -> None:
        """Collect sequences; `fields` are verl's before their conversion to a TensorDict."""
        group = _GROUP.get()
        rows = list(zip(keys, fields, tags, strict=True))
        if group is None:
            await self._put(rows, partition_id)
        else:
            group.rows += rows

    async def async_kv_put(self, key: str, partition_id: str, **options: Any) -> Any:
        """Put the group's sequences, then the prompt's status."""
        group = _GROUP.get()
        if group is not None and group.rows:
            rows, group.rows = group.rows, []
            await self._put(rows, partition_id)
        return await self._queue.async_kv_put(key=key, partition_id=partition_id, **options)

    async def _put(self, rows: list[tuple[str, dict, dict]], partition_id: str) -> None:
        for same in _with_equal_fields(rows):
            keys, fields, tags = (list(column) for column in zip(*same, strict=True))
            await self._queue.async_kv_batch_put(
                keys=keys,
                fields=list_of_dict_to_tensordict(fields),
                tags=tags,
                partition_id=partition_id,
            )


def _with_equal_fields(rows: list[tuple[str, dict, dict]]) -> list[list[tuple[str, dict, dict]]]:
    """Split rows by the names of their fields: a TensorDict has the same ones for all rows."""
    batches: dict[tuple[str, ...], list[tuple[str, dict, dict]]] = {}
    for row in rows:
        batches.setdefault(tuple(sorted(row[1])), []).append(row)
    return list(batches.values())


class CachedAgentLoopWorkerTQ(_VerlWorker):
    """verl's worker; the responses to a prompt share one `Group`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from rcot_rl.training import agentic_loop  # noqa: F401  registers its loop

        super().__init__(*args, **kwargs)
        verl_patches.replace(agent_loop_tq, "tq", GroupedQueue(agent_loop_tq.tq))
        verl_patches.replace(agent_loop_tq, "list_of_dict_to_tensordict", list)
        verl_patches.replace(agent_loop, "hydra", _DIRECT)

    async def _run_prompt(self, prompt: dict, *args: Any, **kwargs: Any) -> None:
        # the responses' tasks copy this task's context, and the group with it
        _GROUP.set(Group())
        try:
            await super()._run_prompt(prompt, *args, **kwargs)
        finally:
            _GROUP.set(None)

    async def _compute_score(self, outputs: list[Any], kwargs: dict) -> None:
        """Score only the last of a session's sequences.

        verl would pad them all together, which fails for positions of several axes (M-RoPE) when
        lengths differ.
        """
        await super()._compute_score(outputs[-1:], kwargs)

    def _compute_multi_modal_inputs(
        self, output: Any, input_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the group's features, or verl's own for a response with its own media."""
        group = _GROUP.get()
        if group is None or group.processed is None or not _shares_media(output, group):
            return super()._compute_multi_modal_inputs(output, input_ids)
        return features(group.processed)


def features(processed: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Convert a processor's output as verl's `_compute_multi_modal_inputs` does.

    Returns:
        A new dictionary of shared tensors: verl removes entries from it.
    """
    inputs = {k: v for k, v in processed.items() if k not in ("input_ids", "attention_mask")}
    grid = inputs.get("image_grid_thw")
    if grid is not None:
        inputs["images_seqlens"] = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
    return inputs


def _shares_media(output: Any, group: Group) -> bool:
    media, shared = output.multi_modal_data or {}, group.media or {}
    return media.keys() == shared.keys() and all(media[key] is shared[key] for key in media)


class CachedAgentLoopManager(agent_loop_tq.AgentLoopManagerTQ):
    """verl's manager with workers of `CachedAgentLoopWorkerTQ`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(CachedAgentLoopWorkerTQ)
