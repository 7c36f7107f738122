"""Readings of hosts at steps: in a thread, repeated in between, and never the end of a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray

from rcot_rl.training.host_metrics import HostMetrics


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., HostMetrics]:
    """Return a function that makes a `HostMetrics` with another reading in place of Ray's."""

    class Context:
        def get_node_id(self) -> str:
            return "driver"

        def get_job_id(self) -> str:
            return "01000000"

    monkeypatch.setattr(ray, "get_runtime_context", Context)

    def make(measure: Callable[[], dict[str, float]], every_s: float) -> HostMetrics:
        metrics = HostMetrics(every_s)
        monkeypatch.setattr(metrics, "_measure", measure)
        return metrics

    return make


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_slow_reading_delays_no_step_but_the_first(hosts: Callable[..., HostMetrics]) -> None:
    release, readings = threading.Event(), iter([1.0, 2.0, 3.0])

    def measure() -> dict[str, float]:
        value = next(readings)
        if value > 1:
            assert release.wait(10)
        return {"memory_gib/node/used_max": value}

    metrics = hosts(measure, every_s=0.0)
    assert metrics.metrics() == {"memory_gib/node/used_max": 1.0}, "the first step has figures"
    for _ in range(5):
        assert metrics.metrics() == {"memory_gib/node/used_max": 1.0}
    release.set()
    until(lambda: metrics.metrics()["memory_gib/node/used_max"] >= 2.0)


def test_steps_within_the_interval_repeat_the_reading(hosts: Callable[..., HostMetrics]) -> None:
    count = iter(range(10))
    metrics = hosts(lambda: {"n": float(next(count))}, every_s=3600.0)
    assert [metrics.metrics()["n"] for _ in range(4)] == [0.0] * 4


def test_a_reading_that_fails_is_logged_and_the_last_one_stays(
    hosts: Callable[..., HostMetrics], caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: Any = iter([{"n": 1.0}, OSError("node lost"), {"n": 2.0}])

    def measure() -> dict[str, float]:
        outcome = next(outcomes, {"n": 3.0})
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    metrics = hosts(measure, every_s=0.0)
    assert metrics.metrics() == {"n": 1.0}
    until(lambda: metrics.metrics()["n"] >= 2.0)
    assert "the hosts' memory could not be read: node lost" in caplog.text
