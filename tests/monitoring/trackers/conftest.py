"""W&B on this host: the fake server, and wandb's variables pointing at it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_wandb_server import FakeWandb


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep wandb's files below tmp_path, and end its process after the test."""
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))
    for name in ("API_KEY", "BASE_URL", "SERVICE", "RUN_ID", "SWEEP_ID", "SWEEP_PARAM_PATH"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield tmp_path / "wandb-home"
    import wandb

    with contextlib.suppress(Exception, SystemExit):  # a test may have killed its process
        wandb.teardown()


@pytest.fixture
def wandb_server(wandb_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    """Return a server to which this process and its children send."""
    with FakeWandb() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
        server.fault = None
