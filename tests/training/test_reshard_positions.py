"""The position in the data on another number of ranks: the same global batches follow."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

ROWS, BATCH = 50, 12


def loader(rank: int, ranks: int, workers: int):
    """As verl's SFT trainer makes one (verl/trainer/sft_trainer.py, `_build_dataloader`)."""
    from torch.utils.data import DistributedSampler
    from torchdata.stateful_dataloader import StatefulDataLoader

    rows = list(range(ROWS))
    sampler = DistributedSampler(rows, shuffle=True, num_replicas=ranks, rank=rank, drop_last=True)
    return StatefulDataLoader(
        dataset=rows,
        batch_size=BATCH // ranks,
        sampler=sampler,
        num_workers=workers,
        drop_last=True,
    )


def batches(loaders) -> list[list[int]]:
    """Global batches, each as the sorted rows of all ranks."""
    return [sorted(int(i) for part in step for i in part) for step in zip(*loaders, strict=True)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (4, 2)])
def test_what_follows_is_what_would_have_followed(before: int, after: int, workers: int) -> None:
    from rcot_rl.training.reshard import rescaled

    running = [loader(rank, before, workers) for rank in range(before)]
    iterators = [iter(one) for one in running]
    for one in iterators:
        next(one), next(one)
    state = running[0].state_dict()
    rest = batches(iterators)
    resumed = [loader(rank, after, workers) for rank in range(after)]
    for one in resumed:
        one.load_state_dict(rescaled(state, before, after))
    assert batches(resumed) == rest and len(rest) == ROWS // BATCH - 2
