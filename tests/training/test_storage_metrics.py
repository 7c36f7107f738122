"""Free space and the size of the newest sealed checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rcot_rl.training.checkpoint_store import point_latest, seal
from rcot_rl.training.storage_metrics import storage_metrics

GIB = 2**30


def checkpoint(folder: Path, step: int, size: int) -> Path:
    path = folder / f"global_step_{step}"
    (path / "actor").mkdir(parents=True)
    (path / "actor" / "model.bin").write_bytes(b"x" * size)
    (path / "data.pt").write_bytes(b"y" * 24)
    return path


def test_free_space_is_that_of_the_file_system_before_the_folder_exists(tmp_path: Path) -> None:
    facts = os.statvfs(tmp_path)
    metrics = storage_metrics(tmp_path / "stage" / "checkpoints")
    assert metrics.keys() == {"disk/free_gib"}
    assert metrics["disk/free_gib"] == pytest.approx(facts.f_bavail * facts.f_frsize / GIB, rel=0.1)


def test_the_size_is_that_of_the_newest_sealed_checkpoint(tmp_path: Path) -> None:
    for step, size in ((1, 1000), (2, 5000)):
        path = checkpoint(tmp_path, step, size)
        assert storage_metrics(tmp_path).get("checkpoint/size_gib") == (
            None if step == 1 else pytest.approx(1024 / GIB)
        ), "an unsealed checkpoint does not count"
        seal(path)
        point_latest(path)
        assert storage_metrics(tmp_path)["checkpoint/size_gib"] == pytest.approx((size + 24) / GIB)


def test_a_broken_manifest_only_lacks_the_size(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 3, 10)
    (path / "checkpoint.json").write_text('{"files": [1]}')
    point_latest(path)
    assert storage_metrics(tmp_path).keys() == {"disk/free_gib"}
