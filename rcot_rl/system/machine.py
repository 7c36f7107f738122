"""What this process may use of its machine: CPUs, memory, GPUs.

A container, a batch job or a user's slice has less than the machine. The limit is the smallest of
the process's cgroup and all cgroups above it, in cgroup version 1 and 2. On a GPU with MIG, each
MIG device counts as a GPU.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path("/")
"""Folder that holds `proc` and `sys`."""


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory."""

    total: int
    """The machine's, or the smallest limit of a cgroup."""
    available: int
    """What can still be allocated once file caches are dropped."""


def cpus(system: Path = SYSTEM) -> int:
    """Return how many CPUs this process may use at once: affinity and cgroup quotas, at least 1."""
    quotas = [q for q in map(_cpu_quota, _groups("cpu", system)) if q is not None]
    return max(1, math.floor(min([len(os.sched_getaffinity(0)), *quotas])))


def memory(system: Path = SYSTEM) -> Memory:
    """Return the main memory that this process may use."""
    values = {}
    for row in (system / "proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = row.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    total, available = values["MemTotal"], values["MemAvailable"]
    for group in _groups("memory", system):
        for limit in _memory_limits(group):
            if limit < values["MemTotal"]:
                total = min(total, limit)
                available = min(available, max(0, limit - _memory_used(group)))
    return Memory(total, available)


def pss_bytes(pid: int) -> int:
    """Return the proportional set size of a process; 0 if it is gone or not readable."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return 0
    for row in text.splitlines():
        if row.startswith("Pss:"):
            return int(row.split()[1]) * 1024
    return 0


def set_niceness(pid: int, niceness: int) -> None:
    """Set how readily a process leaves the CPUs to others: 19 most, 0 normally.

    Linux shares CPUs among sessions first if `sched_autogroup_enabled` is set, and a process'
    niceness counts only within its session. So the niceness of the session is set too, if the
    process leads one: it would else be that of a user's shell. What the system does not permit,
    such as a lower niceness of the process, is left out.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, niceness)
    with contextlib.suppress(OSError):
        if os.getsid(pid) == pid:
            Path(f"/proc/{pid}/autogroup").write_text(str(niceness), encoding="ascii")


def gpu_memories(environment: Mapping[str, str] = os.environ) -> list[float | None] | None:
    """Return the GiB of every visible GPU or MIG device, in nvidia-smi's order.

    Args:
        environment: Its CUDA_VISIBLE_DEVICES selects devices.

    Returns:
        A size is None if nvidia-smi does not report it. None if nvidia-smi is missing or fails.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        sizes = output_of([program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"])
        devices = parse_gpus(sizes, output_of([program, "-L"]))
    except (OSError, subprocess.SubprocessError):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return [d.gib for d in (devices if visible is None else chosen(devices, visible))]


@dataclass(frozen=True)
class Gpu:
    """A GPU or a MIG device."""

    card: int
    names: tuple[str, ...]
    """UUIDs that CUDA_VISIBLE_DEVICES may use for it."""
    gib: float | None


_CARD = re.compile(r"GPU (\d{1,4}): .{0,200}\(UUID: (GPU-[\w-]{1,60})\)")
_MIG = re.compile(r"\s+MIG \S{0,12}\.(\d{1,4})gb\S{0,20}\s.{0,60}\(UUID: (MIG-[\w/-]{1,120})\)")


def parse_gpus(sizes: str, listing: str) -> list[Gpu]:
    """Parse GPUs from two outputs of nvidia-smi; MIG devices replace their card.

    Args:
        sizes: MiB of each card, one per line.
        listing: Output of `nvidia-smi -L`. The size of a MIG device is that of its profile
            (`3g.20gb`) in units of 10^9 bytes, at most 5 % less than what the device has.
    """
    gib = [float(row) / 1024 if _is_number(row) else None for row in sizes.splitlines() if row]
    cards = {index: Gpu(index, (), size) for index, size in enumerate(gib)}
    slices: dict[int, list[Gpu]] = {}
    card = 0
    for row in listing.splitlines():
        if match := _CARD.match(row):
            card = int(match[1])
            cards[card] = Gpu(card, (match[2],), gib[card] if card < len(gib) else None)
        elif (match := _MIG.match(row)) and card in cards:
            device = Gpu(card, (match[2], *cards[card].names), int(match[1]) * 1e9 / 2**30)
            slices.setdefault(card, []).append(device)
    return [d for index, gpu in sorted(cards.items()) for d in slices.get(index, [gpu])]


def chosen(gpus: list[Gpu], visible: str) -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, up to the first unknown one, as CUDA does.

    A card's number or UUID means its first MIG device, if it has any.
    """
    devices: list[Gpu] = []
    for word in visible.split(","):
        name = word.strip()
        if name.isdigit():
            matches = [g for g in gpus if g.card == int(name)]
        else:
            matches = [g for g in gpus if name and any(n.startswith(name) for n in g.names)]
        if not matches:
            break
        devices.append(matches[0])
    return devices


def _is_number(text: str) -> bool:
    return text.strip().replace(".", "", 1).isdigit()


def output_of(command: list[str]) -> str:
    """Return what a command prints. Raises OSError or SubprocessError."""
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout


def _groups(controller: str, system: Path) -> Iterator[Path]:
    """Yield this process's cgroups for a controller, each followed by the groups above it."""
    try:
        lines = (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (system / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        for root, point in _mounts(mounts, controller if names else None):
            # a path outside the mount's root belongs to another namespace
            inside = path.startswith(root.rstrip("/") + "/") and ".." not in path.split("/")
            top = system / point.lstrip("/")
            group = top / (path[len(root) :].lstrip("/") if inside else "")
            yield from [group, *group.parents][: len(group.parts) - len(top.parts) + 1]


def _mounts(lines: list[str], controller: str | None) -> Iterator[tuple[str, str]]:
    """Yield (root, mount point) of the controller's cgroup v1 hierarchy; of cgroup v2 for None."""
    for line in lines:
        fields, _, kind = line.partition(" - ")
        kinds = kind.split()
        if controller is None:
            matches = kinds[:1] == ["cgroup2"]
        else:
            matches = kinds[:1] == ["cgroup"] and controller in kinds[-1].split(",")
        if matches:
            root, point = (_unescaped(word) for word in fields.split()[3:5])
            yield root, point


def _unescaped(text: str) -> str:
    """Decode a path of mountinfo, which escapes blanks as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), text)


def _cpu_quota(group: Path) -> float | None:
    quota, period = (*_words(group / "cpu.max"), "", "")[:2]
    if not quota:
        quota = "".join(_words(group / "cpu.cfs_quota_us"))
        period = "".join(_words(group / "cpu.cfs_period_us"))
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None  # "max", -1, or no such file


def _memory_limits(group: Path) -> Iterator[int]:
    for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
        for word in _words(group / name)[:1]:
            if word.isdigit():
                yield int(word)


def _memory_used(group: Path) -> int:
    """Return the bytes that the cgroup uses, without file caches that the kernel drops first."""
    used = [*_words(group / "memory.current"), *_words(group / "memory.usage_in_bytes"), "0"][0]
    stat = _words(group / "memory.stat")
    caches = dict(zip(stat[::2], stat[1::2], strict=False))
    idle = caches.get("total_inactive_file", caches.get("inactive_file", "0"))
    return max(0, int(used) - int(idle))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []
