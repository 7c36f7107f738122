"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

RunPython = Callable[..., str]


@pytest.fixture(scope="session")
def run_verl_python(run_python: RunPython) -> RunPython:
    """Return `run_python`, with this project's plug-in of verl and the CPU platform."""

    def run(code: str, *arguments: str, cwd: Path | None = None, **variables: str | None) -> str:
        defaults = {"RCOT_RL_PLUGIN": "required", "VERL_PLATFORM": "cpu"}
        return run_python(code, *arguments, cwd=cwd, **(defaults | variables))

    return run
