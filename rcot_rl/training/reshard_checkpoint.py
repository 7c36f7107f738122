"""Reshard a checkpoint: `python -m rcot_rl.training.reshard_checkpoint CHECKPOINT RANKS`.

verl's FSDP2 checkpoints have one file per rank, with that rank's piece of every tensor, and load
only on as many ranks as wrote them. Here the pieces are joined and split again as FSDP2 splits them
(along the first dimension, in equal pieces except for the last): weights, both moments of AdamW,
and whatever else is sharded. Step counts and the scheduler are the same on all ranks. Random states
are kept for the ranks that had one; further ranks reuse them in turn. CoT-SFT has a position in the
data per rank, in rows of that rank; GRPO has one for all.

Not supported: meshes of two dimensions (HSDP, tensor parallelism), which are refused. The whole
state is in memory once.
"""

from __future__ import annotations

import json
import logging
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
from rcot_rl.events import child_process
from rcot_rl.system.files import link_or_copy
from rcot_rl.training.checkpoint_store import MANIFEST, inspect, seal

logger = logging.getLogger(__name__)

KINDS = ("model", "optim", "extra_state")
_YIELDED = "samples_yielded"
"""torchdata's number of rows in a loader's state (torchdata/stateful_dataloader/sampler.py)."""


def reshard(checkpoint: Path, ranks: int) -> None:
    """Convert a complete checkpoint in place to `ranks` ranks. Raises InputError."""
    state = inspect(checkpoint)
    if not state.whole or state.world_size is None:
        raise InputError((*state.faults, "files of several world sizes")[0], file=checkpoint)
    before = state.world_size
    if before == ranks:
        return
    logger.info("%s: resharding from %d to %d ranks", checkpoint, before, ranks)
    folder = next(checkpoint.rglob("model_world_size_*_rank_0.pt")).parent
    partial = checkpoint.with_name(f".{checkpoint.name}.resharded")
    shutil.rmtree(partial, ignore_errors=True)
    rewritten = ("*_world_size_*_rank_*.pt", "data_*.pt", MANIFEST, "fsdp_config.json")
    shutil.copytree(
        checkpoint,
        partial,
        copy_function=link_or_copy,
        ignore=shutil.ignore_patterns(*rewritten),
    )
    target = partial / folder.relative_to(checkpoint)
    for kind in KINDS:
        _convert(folder, target, kind, before, ranks)
    _convert_positions(folder, target, before, ranks)
    config = json.loads((folder / "fsdp_config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, "world_size": ranks}, indent=4)
    (target / "fsdp_config.json").write_text(text, encoding="utf-8")
    old = checkpoint.with_name(f".{checkpoint.name}.{before}-ranks")
    shutil.rmtree(old, ignore_errors=True)
    checkpoint.rename(old)
    partial.rename(checkpoint)
    seal(checkpoint, resharded_from=before)
    shutil.rmtree(old)


def _convert(source: Path, target: Path, kind: str, before: int, after: int) -> None:
    """Write the `kind` files of `after` ranks to `target`, from those of `before` in `source`."""
    paths = [source / f"{kind}_world_size_{before}_rank_{r}.pt" for r in range(before)]
    # written by our own training processes: not foreign pickles
    states = [torch.load(p, map_location="cpu", weights_only=False) for p in paths]
    for rank in range(after):
        with _mesh(rank, after, states) as mesh:
            if kind == "extra_state":
                state = {**states[0], "rng": states[rank % before].get("rng")}
            else:
                state = _split(states, mesh, rank, after, source)
            torch.save(state, target / f"{kind}_world_size_{after}_rank_{rank}.pt")


def _convert_positions(source: Path, target: Path, before: int, after: int) -> None:
    """Write every rank's position in CoT-SFT's rows: equal parts of the same global batches.

    Without one, verl would restart the epoch on that rank, with only a line in the log.
    """
    first = source / "data_0.pt"
    if not first.is_file():
        return
    # written by our own training processes, too
    state = rescaled(torch.load(first, weights_only=False), before, after)
    for rank in range(after):
        torch.save(state, target / f"data_{rank}.pt")


def rescaled(state: Any, before: int, after: int) -> Any:
    """Convert a data loader's state on one of `before` ranks to one of `after` ranks."""
    if not isinstance(state, dict):
        return state
    return {
        key: value * before // after if key == _YIELDED else rescaled(value, before, after)
        for key, value in state.items()
    }


@contextmanager
def _mesh(rank: int, ranks: int, states: list[Any]) -> Iterator[DeviceMesh]:
    """Build the mesh that `rank` sees, without the other ranks; nothing is communicated."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sharded = next((t for t in _leaves(states[0]) if isinstance(t, DTensor)), None)
    names = sharded.device_mesh.mesh_dim_names if sharded is not None else ("fsdp",)
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (ranks,), mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the values of nested dictionaries, lists and tuples."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _split(values: list[Any], mesh: DeviceMesh, rank: int, ranks: int, source: Path) -> Any:
    """Return one rank's new state from all ranks' old ones, which have the same structure."""
    first = values[0]
    if isinstance(first, dict):
        return {k: _split([v[k] for v in values], mesh, rank, ranks, source) for k in first}
    if isinstance(first, list | tuple):
        items = [_split(list(v), mesh, rank, ranks, source) for v in zip(*values, strict=True)]
        return type(first)(items)
    if not isinstance(first, DTensor):
        return first
    if len(first.placements) != 1 or not first.placements[0].is_shard(0):
        raise InputError(f"cannot reshard tensors placed as {first.placements}", file=source)
    joined = torch.cat([v.to_local() for v in values])
    if joined.shape != first.shape:
        raise InputError(
            f"shards have the shape {tuple(joined.shape)}, not {tuple(first.shape)}", file=source
        )
    size = -(-joined.shape[0] // ranks)
    start = min(rank * size, joined.shape[0])
    piece = joined[start : min(start + size, joined.shape[0])].clone()
    return DTensor.from_local(
        piece, mesh, [Shard(0)], run_check=False, shape=joined.shape, stride=joined.stride()
    )


if __name__ == "__main__":
    with child_process():
        reshard(Path(sys.argv[1]), int(sys.argv[2]))
