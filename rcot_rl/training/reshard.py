"""A checkpoint for another number of ranks: `python -m rcot_rl.training.reshard CKPT RANKS`.

verl's FSDP2 checkpoints are one file a rank, each with that rank's piece of every tensor, and load
only on as many ranks as wrote them. Here the pieces are put together and cut anew, as FSDP2 cuts
them (by the first dimension, in equal pieces but for the last): weights, both moments of AdamW,
whatever else is sharded. Step counts and the scheduler are the same on all ranks; random states are
kept for the ranks that had one, and taken in turn for further ones. CoT-SFT has a position in the
data for each rank, in rows of that rank; GRPO has one for all.

Left out: meshes of two dimensions (HSDP, tensor parallelism), which are refused. The whole state is
in memory once.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from rcot_rl.errors import InputError
from rcot_rl.files import link_or_copy
from rcot_rl.training.checkpoint_store import MANIFEST, inspect, seal

KINDS = ("model", "optim", "extra_state")
_YIELDED = "samples_yielded"
"""torchdata's count of rows in a loader's state (torchdata/stateful_dataloader/sampler.py)."""


def reshard(checkpoint: Path, ranks: int) -> None:
    """Make `checkpoint` (a whole global_step_N) one of `ranks` ranks, in place.

    Raises InputError for a checkpoint that is not whole, or sharded in a way this cannot cut.
    """
    found = inspect(checkpoint)
    if not found.whole or found.world_size is None:
        raise InputError((*found.faults, "several world sizes")[0], file=checkpoint)
    if found.world_size == ranks:
        return
    folder = next(checkpoint.rglob("model_world_size_*_rank_0.pt")).parent
    partial = checkpoint.with_name(f".{checkpoint.name}.resharded")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(
        checkpoint, partial, copy_function=link_or_copy,
        ignore=shutil.ignore_patterns(
            "*_world_size_*_rank_*.pt", "data_*.pt", MANIFEST, "fsdp_config.json"
        ),
    )  # fmt: skip
    target = partial / folder.relative_to(checkpoint)
    for kind in KINDS:
        _convert(folder, target, kind, found.world_size, ranks)
    _positions(folder, target, found.world_size, ranks)
    config = json.loads((folder / "fsdp_config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, "world_size": ranks}, indent=4)
    (target / "fsdp_config.json").write_text(text, encoding="utf-8")
    old = checkpoint.with_name(f".{checkpoint.name}.{found.world_size}-ranks")
    shutil.rmtree(old, ignore_errors=True)
    checkpoint.rename(old)
    partial.rename(checkpoint)
    seal(checkpoint, resharded_from=found.world_size)
    shutil.rmtree(old)


def _convert(source: Path, target: Path, kind: str, before: int, after: int) -> None:
    paths = [source / f"{kind}_world_size_{before}_rank_{r}.pt" for r in range(before)]
    # written by our own training processes: not foreign pickles
    states = [torch.load(p, map_location="cpu", weights_only=False) for p in paths]
    for rank in range(after):
        with _mesh(rank, after, states) as mesh:
            if kind == "extra_state":
                state = {**states[0], "rng": states[rank % before].get("rng")}
            else:
                state = _cut(states, mesh, rank, after, source)
            torch.save(state, target / f"{kind}_world_size_{after}_rank_{rank}.pt")


def _positions(source: Path, target: Path, before: int, after: int) -> None:
    """Every rank's position in CoT-SFT's rows: equal parts of the same global batches. A rank
    without one would begin the epoch again, with no more than a line in the log (verl)."""
    first = source / "data_0.pt"
    if not first.is_file():
        return
    state = rescaled(torch.load(first, weights_only=False), before, after)
    for rank in range(after):
        torch.save(state, target / f"data_{rank}.pt")


def rescaled(state: Any, before: int, after: int) -> Any:
    """A data loader's state on one of `after` ranks, from the state on one of `before`."""
    if not isinstance(state, dict):
        return state
    return {
        key: value * before // after if key == _YIELDED else rescaled(value, before, after)
        for key, value in state.items()
    }


@contextmanager
def _mesh(rank: int, ranks: int, states: list[Any]) -> Iterator[DeviceMesh]:
    """A mesh as seen by one rank, without the others: nothing is communicated."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sharded = next((t for t in _leaves(states[0]) if isinstance(t, DTensor)), None)
    names = sharded.device_mesh.mesh_dim_names if sharded is not None else ("fsdp",)
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (ranks,), mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _cut(values: list[Any], mesh: DeviceMesh, rank: int, ranks: int, place: Path) -> Any:
    """One rank's new state from all ranks' old ones, walked in step."""
    first = values[0]
    if isinstance(first, dict):
        return {k: _cut([v[k] for v in values], mesh, rank, ranks, place) for k in first}
    if isinstance(first, list | tuple):
        items = [_cut(list(v), mesh, rank, ranks, place) for v in zip(*values, strict=True)]
        return type(first)(items)
    if not isinstance(first, DTensor):
        return first
    if len(first.placements) != 1 or not first.placements[0].is_shard(0):
        raise InputError(f"tensors sharded as {first.placements} cannot be cut anew", file=place)
    whole = torch.cat([v.to_local() for v in values])
    if whole.shape != first.shape:
        raise InputError(f"pieces make {tuple(whole.shape)} of {tuple(first.shape)}", file=place)
    size = -(-whole.shape[0] // ranks)
    start = min(rank * size, whole.shape[0])
    piece = whole[start : min(start + size, whole.shape[0])].clone()
    return DTensor.from_local(
        piece, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


if __name__ == "__main__":
    reshard(Path(sys.argv[1]), int(sys.argv[2]))
