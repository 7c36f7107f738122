"""Fixtures of the supervisor's tests."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest


def is_alive(pid: int) -> bool:
    """Return True if the process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def living() -> Callable[..., list[int]]:
    """Return a function that waits `within` seconds for pids to end; it returns those alive."""

    def wait(pids: list[int], within: float = 5.0) -> list[int]:
        end = time.monotonic() + within
        while True:
            alive = [pid for pid in pids if is_alive(pid)]
            if not alive or time.monotonic() > end:
                return alive
            time.sleep(0.05)

    return wait
