"""What this process may use of its machine: CPUs, memory, GPUs.

A container, a batch job or a user's slice has less than the machine. Its limits are those of the
process' own control group and of all groups above it, in version 1 and 2 of Linux' control groups;
the smallest counts. A GPU that is cut into MIG devices is used a device at a time.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path("/")


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory."""

    total: int
    """Of the machine, or the smallest limit of a control group."""
    available: int
    """What can still be allocated, file caches given up."""


def cpus(system: Path = SYSTEM) -> int:
    """CPUs that this process may run on at once: its affinity and its groups' quotas, at least 1.

    system: the folder that holds `proc` and `sys`.
    """
    quotas = [q for q in map(_cpu_quota, _groups("cpu", system)) if q is not None]
    return max(1, math.floor(min([len(os.sched_getaffinity(0)), *quotas])))


def memory(system: Path = SYSTEM) -> Memory:
    """Main memory that this process may have."""
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


def gpu_memories(environment: Mapping[str, str] = os.environ) -> list[float | None] | None:
    """GiB of every visible GPU or MIG device (None: not told), as nvidia-smi lists them.

    environment: CUDA_VISIBLE_DEVICES in it chooses. None: nvidia-smi is not here, or fails.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        sizes = _ask([program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"])
        devices = parse_gpus(sizes, _ask([program, "-L"]))
    except (OSError, subprocess.SubprocessError):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return [d.gib for d in (devices if visible is None else chosen(devices, visible))]


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG device of one."""

    card: int
    names: tuple[str, ...]
    """UUIDs by which CUDA_VISIBLE_DEVICES may name it."""
    gib: float | None


_CARD = re.compile(r"GPU (\d{1,4}): .{0,200}\(UUID: (GPU-[\w-]{1,60})\)")
_MIG = re.compile(r"\s+MIG \S{0,12}\.(\d{1,4})gb\S{0,20}\s.{0,60}\(UUID: (MIG-[\w/-]{1,120})\)")


def parse_gpus(sizes: str, listing: str) -> list[Gpu]:
    """GPUs from two outputs of nvidia-smi: MiB of each card, a line each, and `-L`.

    A card with MIG devices is listed as those. Their profile (`3g.20gb`) gives the size: in units
    of 10^9 bytes, which is at most 5 % less than what the device has.
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
    """Those that a value of CUDA_VISIBLE_DEVICES names, up to the first unknown one, as CUDA does.

    A card's number or UUID stands for its first MIG device, if it has any.
    """
    found: list[Gpu] = []
    for word in visible.split(","):
        name = word.strip()
        if name.isdigit():
            match = [g for g in gpus if g.card == int(name)]
        else:
            match = [g for g in gpus if name and any(n.startswith(name) for n in g.names)]
        if not match:
            break
        found.append(match[0])
    return found


def _is_number(text: str) -> bool:
    return text.strip().replace(".", "", 1).isdigit()


def _ask(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout


def _groups(controller: str, system: Path) -> Iterator[Path]:
    """This process' control groups of a controller, each with the groups above it."""
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
            # a path that is not below the mount's root is another namespace's
            inside = path.startswith(root.rstrip("/") + "/") and ".." not in path.split("/")
            top = system / point.lstrip("/")
            group = top / (path[len(root) :].lstrip("/") if inside else "")
            yield from [group, *group.parents][: len(group.parts) - len(top.parts) + 1]


def _mounts(lines: list[str], controller: str | None) -> Iterator[tuple[str, str]]:
    """(root, mount point) of version 1's hierarchy of the controller; None: of version 2."""
    for line in lines:
        fields, _, kind = line.partition(" - ")
        kinds = kind.split()
        if controller is None:
            right = kinds[:1] == ["cgroup2"]
        else:
            right = kinds[:1] == ["cgroup"] and controller in kinds[-1].split(",")
        if right:
            root, point = (_unescaped(word) for word in fields.split()[3:5])
            yield root, point


def _unescaped(text: str) -> str:
    """A path of mountinfo, which writes blanks in octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


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
    """Bytes that the group holds, but for file caches that the kernel gives up first."""
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
