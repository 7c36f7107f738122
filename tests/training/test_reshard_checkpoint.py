"""Resharding keeps weights, moments, steps and random states bit for bit, and the data position."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WORKER = r"""
import json, os, random, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

mode, folder = sys.argv[1], Path(sys.argv[2])
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("fsdp",))
torch.manual_seed(7)
model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
for layer in (model[0], model[2], model):
    fully_shard(layer, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)

def path(kind):
    return folder / "actor" / f"{kind}_world_size_{size}_rank_{rank}.pt"

def steps(n):
    for k in range(n):
        torch.manual_seed(k)
        model(torch.randn(4, 5)).square().mean().backward()  # the same batch on every rank
        optimizer.step(); optimizer.zero_grad(); scheduler.step()

if mode == "save":
    steps(3)
    (folder / "actor").mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path("model"))
    torch.save(optimizer.state_dict(), path("optim"))
    extra = {"lr_scheduler": scheduler.state_dict(), "rng": {"cpu": torch.get_rng_state()}}
    torch.save(extra, path("extra_state"))
    (folder / "actor" / "fsdp_config.json").write_text(
        json.dumps({"FSDP_version": 2, "world_size": size}))
    torch.save({"position": 3}, folder / "data.pt")
else:
    model.load_state_dict(torch.load(path("model"), weights_only=False))
    optimizer.load_state_dict(torch.load(path("optim"), weights_only=False))
    scheduler.load_state_dict(torch.load(path("extra_state"), weights_only=False)["lr_scheduler"])

def whole():
    # copies: on one rank, whole tensors are the parameters themselves
    out = {n: p.full_tensor().clone() for n, p in model.state_dict().items()}
    for k, state in optimizer.state_dict()["state"].items():
        out |= {f"{k}.{n}": (v.full_tensor() if hasattr(v, "full_tensor") else v).clone()
                for n, v in state.items()}
    return out

now = whole()
if mode == "load":
    steps(2)  # training continues
    after = whole()
if rank == 0:
    torch.save(now, sys.argv[3])
    if mode == "load":
        torch.save(after, sys.argv[3] + ".after")
dist.barrier(); dist.destroy_process_group()
os._exit(0)  # gloo's threads sometimes abort the interpreter's normal exit
"""


def _run_module(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _run(ranks: int, *arguments: object) -> None:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    _run_module(*launcher, *arguments)


def _reshard(checkpoint: Path, ranks: int) -> None:
    _run_module("rcot_rl.training.reshard_checkpoint", checkpoint, ranks)


def test_resharding_from_1_to_2_to_3_and_back_loses_nothing(tmp_path):
    import torch

    from rcot_rl.training.checkpoint_store import inspect

    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    checkpoint = tmp_path / "global_step_3"
    _run(1, worker, "save", checkpoint, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt")
    before = torch.load(
        checkpoint / "actor" / "extra_state_world_size_1_rank_0.pt", weights_only=False
    )
    trained_on = []
    for ranks in (2, 3, 1):
        _reshard(checkpoint, ranks)
        resharded = inspect(checkpoint, deep=True)
        assert resharded.whole and resharded.sealed and resharded.world_size == ranks
        loaded = tmp_path / f"loaded{ranks}.pt"
        _run(ranks, worker, "load", checkpoint, loaded)
        state = torch.load(loaded)
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[k], saved[k]) for k in saved)
        trained_on.append(torch.load(f"{loaded}.after"))
    after = torch.load(
        checkpoint / "actor" / "extra_state_world_size_1_rank_0.pt", weights_only=False
    )
    assert after["lr_scheduler"] == before["lr_scheduler"]
    assert torch.equal(after["rng"]["cpu"], before["rng"]["cpu"])
    for state in trained_on[1:]:
        assert all(
            torch.allclose(state[k].float(), trained_on[0][k].float(), atol=1e-6) for k in state
        )
    assert not list(tmp_path.glob(".global_step_3*"))


ROWS, BATCH = 50, 12


def loader(rank: int, ranks: int, workers: int):
    """A loader built as in verl (verl/trainer/sft_trainer.py, `_build_dataloader`)."""
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
    """Return global batches, each as the sorted rows of all ranks."""
    return [sorted(int(i) for part in step for i in part) for step in zip(*loaders, strict=True)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (4, 2)])
def test_a_resharded_position_continues_with_the_same_global_batches(
    before: int, after: int, workers: int
) -> None:
    from rcot_rl.training.reshard_checkpoint import rescaled

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
