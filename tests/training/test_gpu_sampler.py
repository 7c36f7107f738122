"""GPU figures from a fake NVML: means and maxima, unsupported figures, hosts without a GPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rcot_rl.training.gpu_sampler import GpuSampler

GIB = 2**30


class FakeNVMLError(Exception):
    pass


class FakeNvml:
    """NVML with two GPUs; their figures change with every sample."""

    NVMLError = FakeNVMLError

    def __init__(self) -> None:
        self.used = {0: iter([1 * GIB, 3 * GIB]), 1: iter([2 * GIB, 6 * GIB])}
        self.percent = {0: iter([10, 30]), 1: iter([100, 60])}

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=next(self.used[handle]))

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=next(self.percent[handle]))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    return lambda nvml: monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_a_step_has_mean_and_maximum_over_gpus_and_samples(install: Callable[[Any], None]) -> None:
    install(FakeNvml())
    with GpuSampler(interval_s=3600) as sampler:
        assert sampler.has_gpus
        sampler._sample()  # as the thread does
        assert sampler.take() == {
            "memory_gib/mean": (1 + 2 + 3 + 6) / 4,
            "memory_gib/max": 6.0,
            "utilization_percent/mean": (10 + 100 + 30 + 60) / 4,
            "utilization_percent/max": 100.0,
        }


def test_the_thread_samples_between_two_calls(install: Callable[[Any], None]) -> None:
    nvml = FakeNvml()
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=GIB)  # type: ignore[method-assign]
    reads: list[float] = []

    def rates(handle: int) -> Any:
        reads.append(time.monotonic())
        return SimpleNamespace(gpu=50)

    nvml.nvmlDeviceGetUtilizationRates = rates  # type: ignore[method-assign]
    install(nvml)
    with GpuSampler(interval_s=0.01) as sampler:
        deadline = time.monotonic() + 10
        while len(reads) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(reads) >= 8, "nobody called take()"
        assert sampler.take()["utilization_percent/mean"] == 50


def test_a_figure_that_the_device_does_not_support_is_left_out(
    install: Callable[[Any], None],
) -> None:
    nvml = FakeNvml()

    def unsupported(handle: int) -> Any:
        raise FakeNVMLError("Not Supported")

    nvml.nvmlDeviceGetUtilizationRates = unsupported  # type: ignore[method-assign]
    install(nvml)
    with GpuSampler(interval_s=3600) as sampler:
        assert sampler.take() == {"memory_gib/mean": 1.5, "memory_gib/max": 2.0}


@pytest.mark.parametrize("lack", ["module", "driver", "gpu"])
def test_a_host_without_gpus_has_no_figures(lack: str, install: Callable[[Any], None]) -> None:
    nvml = FakeNvml()
    if lack == "driver":

        def missing() -> None:
            raise FakeNVMLError("Driver Not Loaded")

        nvml.nvmlInit = missing  # type: ignore[method-assign]
    nvml.nvmlDeviceGetCount = lambda: 0  # type: ignore[method-assign]
    install(None if lack == "module" else nvml)
    sampler = GpuSampler(interval_s=0.01)
    assert not sampler.has_gpus
    assert sampler.take() == {}
