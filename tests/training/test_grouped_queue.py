"""A group's sequences reach TransferQueue in one put, before the prompt's final status."""

import asyncio
from typing import Any

import pytest
import torch

from rcot_rl.training import cached_agent_loop
from rcot_rl.training.cached_agent_loop import _GROUP, Group, GroupedQueue, instantiate_loop


class Queue:
    """Records TransferQueue's calls in order."""

    other = "unchanged"

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    async def async_kv_batch_put(self, keys: list, fields: Any, tags: list, partition_id: str):
        lengths = [len(ids) for ids in fields["input_ids"].unbind()]
        self.calls.append(("put", keys, lengths, tags, partition_id))

    async def async_kv_put(self, key: str, partition_id: str, tag: dict):
        self.calls.append(("status", key, tag["status"], partition_id))


async def session(queue: GroupedQueue, number: int, fails: bool = False) -> None:
    await asyncio.sleep(0.01 * (3 - number))
    if fails:
        raise RuntimeError("lost")
    fields = [{"input_ids": torch.arange(number + 2), "uid": "a"}]
    await queue.async_kv_batch_put([f"a_{number}_0"], fields, [{"n": number}], "train")


async def prompt(queue: GroupedQueue, failing: int | None) -> None:
    """Do what verl's `_run_prompt` does with the queue."""
    _GROUP.set(Group())
    await queue.async_kv_put(key="a", partition_id="train", tag={"status": "running"})
    sessions = [asyncio.create_task(session(queue, i, i == failing)) for i in range(3)]
    await asyncio.gather(*sessions, return_exceptions=True)
    await queue.async_kv_put(key="a", partition_id="train", tag={"status": "done"})


@pytest.mark.parametrize("failing", [None, 1])
def test_one_put_between_the_statuses_has_all_finished_sequences(failing: int | None):
    queue = Queue()
    asyncio.run(prompt(GroupedQueue(queue), failing))
    finished = [i for i in (2, 1, 0) if i != failing]
    assert queue.calls == [
        ("status", "a", "running", "train"),
        (
            "put",
            [f"a_{i}_0" for i in finished],
            [i + 2 for i in finished],
            [{"n": i} for i in finished],
            "train",
        ),
        ("status", "a", "done", "train"),
    ]


def test_without_a_group_sequences_are_put_at_once():
    queue = Queue()
    asyncio.run(session(GroupedQueue(queue), 0))
    assert [call[:2] for call in queue.calls] == [("put", ["a_0_0"])]
    assert GroupedQueue(queue).other == "unchanged"


def test_sequences_with_different_fields_are_put_separately():
    queue = Queue()

    async def run() -> None:
        _GROUP.set(Group())
        grouped = GroupedQueue(queue)
        for i, extra in enumerate([{}, {"routed_experts": torch.ones(1)}, {}]):
            fields = [{"input_ids": torch.arange(3), **extra}]
            await grouped.async_kv_batch_put([f"a_{i}_0"], fields, [{}], "train")
        await grouped.async_kv_put(key="a", partition_id="train", tag={"status": "done"})

    asyncio.run(run())
    assert [call[1] for call in queue.calls[:-1]] == [["a_0_0", "a_2_0"], ["a_1_0"]]


class Loop:
    """Stands for an agent loop."""

    def __init__(self, name: str, own: Any = None) -> None:
        self.name, self.own = name, own


def test_a_loop_is_built_from_its_target_with_or_without_own_settings():
    target = f"{__name__}.Loop"
    cached_agent_loop.hydra.utils.get_class(target)
    assert instantiate_loop({"_target_": target}, name="x").name == "x"
    nested = {"_target_": target, "own": {"_target_": target, "name": "inner"}}
    assert instantiate_loop(nested, name="y").own.name == "inner"
