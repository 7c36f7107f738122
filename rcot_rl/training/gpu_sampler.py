"""Memory and utilization of a host's GPUs, sampled in a thread while a step runs.

NVML (`nvidia-ml-py`) reports them without a process of its own. A host without it or without a GPU
has no figures: a missing metric is not a GPU that idles.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Self

logger = logging.getLogger(__name__)

GIB = 2**30


class GpuSampler:
    """Samples all GPUs that NVML lists on this host; leaving the context ends its thread."""

    def __init__(self, interval_s: float = 1.0) -> None:
        self._samples: dict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._nvml, self._handles = _open_nvml()
        if self._handles:
            loop = threading.Thread(target=self._run, args=(interval_s,), daemon=True)
            loop.start()
            logger.info("%d GPUs are sampled every %g s", len(self._handles), interval_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    @property
    def has_gpus(self) -> bool:
        """True if there is a GPU to sample."""
        return bool(self._handles)

    def take(self) -> dict[str, float]:
        """Return mean and maximum over the GPUs and the time since the last call.

        The keys are `utilization_percent/mean`, `utilization_percent/max`, `memory_gib/mean` and
        `memory_gib/max`; a figure that the driver does not report, as the utilization of a MIG
        device, is left out.
        """
        if not self._handles:
            return {}
        self._sample()  # so that a step shorter than the interval has figures
        with self._lock:
            samples, self._samples = self._samples, defaultdict(list)
        metrics = {}
        for name, values in samples.items():
            metrics[f"{name}/mean"] = sum(values) / len(values)
            metrics[f"{name}/max"] = max(values)
        return metrics

    def _run(self, interval_s: float) -> None:
        while not self._ended.wait(interval_s):
            self._sample()

    def _sample(self) -> None:
        for handle in self._handles:
            self._add("memory_gib", lambda h: self._nvml.nvmlDeviceGetMemoryInfo(h).used, handle)
            self._add(
                "utilization_percent",
                lambda h: self._nvml.nvmlDeviceGetUtilizationRates(h).gpu,
                handle,
            )

    def _add(self, name: str, figure: Callable[[Any], float], handle: Any) -> None:
        try:
            value = float(figure(handle))
        except self._nvml.NVMLError:
            return  # not supported by this device, or the device is lost
        with self._lock:
            self._samples[name].append(value / GIB if name == "memory_gib" else value)


def _open_nvml() -> tuple[Any, list[Any]]:
    """Return NVML and the handles of all GPUs; no handles without NVML, a driver or a GPU."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, []
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
        return nvml, [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    except nvml.NVMLError as error:
        logger.info("no GPU figures: %s", error)
        return nvml, []
