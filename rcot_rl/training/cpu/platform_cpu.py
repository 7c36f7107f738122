"""A CPU platform for verl, registered with verl's own platform registry.

verl 0.9.1 ships only nvidia, rocm and npu platforms. This one lets the unmodified trainer run on a
host without an accelerator (FSDP2 on gloo, vLLM's CPU build). Auto-detection never chooses it, so
that nothing changes on the CPU head node of a GPU cluster: set VERL_PLATFORM=cpu.

Ray gets logical "GPU" resources (`ray_init.num_gpus`), because verl's resource pools count nothing
else.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

from rcot_rl.system import machine


def selected() -> bool:
    """Return True if this process runs verl on the CPU."""
    return os.environ.get("VERL_PLATFORM", "").lower() == "cpu"


def _peak_memory_bytes(*_: Any) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _CpuDeviceModule(ModuleType):
    """torch.cpu, with the accelerator calls that verl makes unconditionally."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        # verl takes this for "is there accelerator memory to account for"
        return False

    def current_device(self) -> str:
        # an index would be read as cuda:0 by .to()
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def ipc_collect(self) -> None:
        pass

    def get_device_name(self, *_: Any) -> str:
        return "cpu"

    max_memory_allocated = staticmethod(_peak_memory_bytes)
    max_memory_reserved = staticmethod(_peak_memory_bytes)
    memory_allocated = staticmethod(_peak_memory_bytes)
    memory_reserved = staticmethod(_peak_memory_bytes)

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        memory = machine.memory()
        return memory.available, memory.total


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """verl's platform interface on a host without an accelerator."""

    device_name = "cpu"
    vendor_name = "generic"
    device_module = _CpuDeviceModule("rcot_rl.training.cpu_device_module")

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return selected()

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "RCOT_CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        # weights then travel through shared memory instead of CUDA IPC
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        return {}

    def cudart(self) -> None:
        return None
