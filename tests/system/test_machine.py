"""What a process may use of its machine: on fake /proc and /sys trees, and on this one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rcot_rl.system import machine

GIB = 2**30
V2 = "25 1 0:22 {root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1 = (
    "31 1 0:31 {root} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
    "32 1 0:32 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 1 0:33 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"
)
UNLIMITED = 9223372036854771712
Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A machine of 64 GiB, 60 of them available, and 16 CPUs; files: path below /sys/fs/cgroup."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))

    def make(groups: str, mounts: str, files: dict[str, object]) -> Path:
        proc = tmp_path / "proc" / "self"
        proc.mkdir(parents=True)
        rows = {"MemTotal": 64, "MemFree": 1, "MemAvailable": 60}
        text = "".join(f"{name}:   {gib * 2**20} kB\n" for name, gib in rows.items())
        (proc.parent / "meminfo").write_text(text)
        (proc / "cgroup").write_text(groups)
        (proc / "mountinfo").write_text("20 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts + "\n")
        for name, value in files.items():
            file = tmp_path / f"sys/fs/cgroup/{name}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{value}\n")
        return tmp_path

    return make


def test_without_cgroups_the_whole_machine_counts(tree: Tree) -> None:
    system = tree("0::/\n", "", {})
    assert machine.cpus(system) == 16
    assert machine.memory(system) == machine.Memory(64 * GIB, 60 * GIB)


@pytest.mark.parametrize("level", ["", "job_5", "job_5/step_0", "job_5/step_0/task_0"])
@pytest.mark.parametrize("version", [1, 2])
def test_limit_of_every_parent_cgroup_counts(tree: Tree, version: int, level: str) -> None:
    if version == 2:
        files = {
            f"{level}/memory.max": 8 * GIB,
            f"{level}/memory.current": 5 * GIB,
            f"{level}/memory.stat": f"anon {4 * GIB}\ninactive_file {2 * GIB}",
            f"{level}/cpu.max": "350000 100000",
        }
        groups, mounts = "0::/job_5/step_0/task_0\n", V2.format(root="/")
    else:
        files = {
            f"memory/{level}/memory.limit_in_bytes": 8 * GIB,
            f"memory/{level}/memory.usage_in_bytes": 5 * GIB,
            f"memory/{level}/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GIB}",
            f"cpu,cpuacct/{level}/cpu.cfs_quota_us": 350000,
            f"cpu,cpuacct/{level}/cpu.cfs_period_us": 100000,
        }
        path = "/job_5/step_0/task_0"
        groups = f"9:memory:{path}\n8:cpu,cpuacct:{path}\n3:cpuset:/other\n0::/elsewhere\n"
        mounts = V1.format(root="/")
    system = tree(groups, mounts, files)
    assert machine.memory(system) == machine.Memory(8 * GIB, 5 * GIB)
    assert machine.cpus(system) == 3


def test_smallest_limit_counts_and_that_of_a_sibling_does_not(tree: Tree) -> None:
    files = {
        "a/memory.max": 16 * GIB,
        "a/b/memory.max": "max",
        "a/b/c/memory.max": 32 * GIB,
        "a/x/memory.max": GIB,
        "a/b/c/d/memory.max": GIB,
        "a/memory.current": 15 * GIB,
        "a/b/memory.high": 12 * GIB,
        "cpu.max": "max 100000",
        "a/cpu.max": "800000 100000",
        "a/b/cpu.max": "50000 100000",
        "a/x/cpu.max": "10000 100000",
    }
    system = tree("0::/a/b/c\n", V2.format(root="/"), files)
    assert machine.memory(system) == machine.Memory(12 * GIB, GIB)
    assert machine.cpus(system) == 1, "half a CPU"


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/", "/"),  # private namespace
        ("/docker/0a1b", "/docker/0a1b"),  # the host's namespace, the container's cgroup mounted
        ("/docker/0a1b", "/kubepods/pod7"),  # a path that the mount does not show
        ("/../../system.slice/x", "/"),  # moved out of the namespace
    ],
)
def test_in_a_container_the_mount_root_is_the_cgroup(tree: Tree, path: str, root: str) -> None:
    system = tree(
        f"0::{path}\n", V2.format(root=root), {"memory.max": 4 * GIB, "cpu.max": "200000 100000"}
    )
    assert machine.memory(system).total == 4 * GIB
    assert machine.cpus(system) == 2


def test_each_spelling_of_no_limit_is_no_limit(tree: Tree) -> None:
    files = {
        "memory/memory.limit_in_bytes": UNLIMITED,
        "memory/memory.usage_in_bytes": GIB,
        "cpu,cpuacct/cpu.cfs_quota_us": -1,
        "cpu,cpuacct/cpu.cfs_period_us": 100000,
    }
    system = tree("9:memory:/\n8:cpu,cpuacct:/\n", V1.format(root="/"), files)
    assert machine.memory(system) == machine.Memory(64 * GIB, 60 * GIB)
    assert machine.cpus(system) == 16


def test_mount_point_may_contain_a_blank(tree: Tree) -> None:
    mount = r"25 1 0:22 / /sys/fs/cgroup/my\040groups rw - cgroup2 none rw"
    system = tree("0::/a\n", mount, {"my groups/a/memory.max": GIB})
    assert machine.memory(system).total == GIB


def test_limits_of_this_process_are_plausible() -> None:
    here = machine.memory()
    assert 0 < here.available <= here.total
    assert 1 <= machine.cpus() <= len(os.sched_getaffinity(0))


CARDS = "40960\n81559\n"
LISTING = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-0000-0000-0000-000000000000)
  MIG 3g.20gb     Device  0: (UUID: MIG-c7384736-a75d-5afc-978f-d2f1294409fd)
  MIG 1g.5gb+me   Device  1: (UUID: MIG-aaaaaaaa-a75d-5afc-978f-d2f1294409fd)
  MIG 1c.2g.10gb  Device  2: (UUID: MIG-GPU-5d5ba0d6-0000-0000-0000-000000000000/5/0)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-e1f2a3b4-0000-0000-0000-000000000000)
"""
GB = 1e9 / GIB


def test_mig_device_has_the_size_of_its_profile() -> None:
    gib = [g.gib for g in machine.parse_gpus(CARDS, LISTING)]
    assert gib == [20 * GB, 5 * GB, 10 * GB, 81559 / 1024]


@pytest.mark.parametrize(
    ("visible", "gib"),
    [
        ("MIG-aaaaaaaa-a75d-5afc-978f-d2f1294409fd", [5 * GB]),
        ("MIG-aaaa", [5 * GB]),
        ("MIG-GPU-5d5ba0d6-0000-0000-0000-000000000000/5/0", [10 * GB]),
        ("0", [20 * GB]),
        ("1, 0", [81559 / 1024, 20 * GB]),
        ("GPU-e1f2", [81559 / 1024]),
        ("1,7,0", [81559 / 1024]),
        ("", []),
        ("NoDevFiles", []),
        ("-1", []),
    ],
)
def test_cuda_visible_devices_selects_devices(visible: str, gib: list[float]) -> None:
    gpus = machine.parse_gpus(CARDS, LISTING)
    assert [g.gib for g in machine.chosen(gpus, visible)] == gib


@pytest.mark.parametrize("size", ["[N/A]", "[Insufficient Permissions]", ""])
def test_unreported_size_is_none(size: str) -> None:
    one = "GPU 0: NVIDIA GB10 (UUID: GPU-1)\n"
    assert [g.gib for g in machine.parse_gpus(f"{size}\n", one)] == [None]
    sliced = one + "  MIG 1g.10gb     Device  0: (UUID: MIG-1)\n"
    assert [g.gib for g in machine.parse_gpus(f"{size}\n", sliced)] == [10 * GB]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "nvidia-smi"
    (tmp_path / "L").write_text(LISTING)
    program.write_text(
        f'#!/bin/sh\nif [ "$1" = -L ]; then cat {tmp_path}/L; else printf "{CARDS}"; fi\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return program


def test_gpu_memories_come_from_nvidia_smi(nvidia_smi: Path) -> None:
    assert machine.gpu_memories({}) == [20 * GB, 5 * GB, 10 * GB, 81559 / 1024]
    assert machine.gpu_memories({"CUDA_VISIBLE_DEVICES": "MIG-c738"}) == [20 * GB]
    nvidia_smi.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpu_memories({}) is None
