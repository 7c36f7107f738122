"""Weights in safetensors files: are all parts there, and is each file whole?

Reads headers alone (no tensor, no torch), so that a pointer of Git LFS or half a download is known
before anything is loaded. Left out: the values, and pickle files, which can run code when they are
read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from rcot_rl.errors import InputError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LFS = b"version https://git-lfs.github.com/spec/"
_MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16,
    "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
_AGAIN = "copy or download it again"


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint folder.

    Raises InputError, naming the file, for weights that are missing, no safetensors, or not whole.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    wanted = weight_map(folder)
    files = weight_files(folder)
    for file in files:
        shapes |= tensors_of(file)
    for name, part in (wanted or {}).items():
        if name not in shapes:
            raise InputError(
                f"the index names it in {part}, which does not have it; {_AGAIN}",
                file=folder / "model.safetensors.index.json",
                key=name,
            )
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder. Raises InputError if one is not there."""
    wanted = weight_map(folder)
    names = ["model.safetensors"] if wanted is None else sorted(set(wanted.values()))
    for name in names:
        if not (folder / name).is_file():
            raise InputError(
                f"the model folder lacks weights{_instead(folder)}", file=folder / name
            )
    return [folder / name for name in names]


def weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> file, from the index of weights in several files; None without an index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None
    refuse_pointer(index)
    try:
        value = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"not readable as JSON: {error}", file=index) from error
    table = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise InputError("not a map of tensors to files", file=index, key="weight_map")
    return {name: Path(file).name for name, file in table.items()}


def tensors_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of one file, whose size must be the one that its header says.

    Raises InputError for anything else.
    """
    refuse_pointer(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if head[:2] == b"PK" or head[:1] == b"\x80":
                raise InputError(
                    "unreadable weights: is a pickle file of PyTorch, not safetensors; save the "
                    "model with save_pretrained(…, safe_serialization=True)",
                    file=file,
                )
            if size < 8 or length > _MAX_HEADER or 8 + length > size:
                raise InputError(
                    f"unreadable weights: cut off, or no safetensors ({size} bytes); {_AGAIN}",
                    file=file,
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise InputError(f"unreadable weights: {error.strerror}", file=file) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"unreadable weights: the header is not JSON; {_AGAIN}", file=file
        ) from error
    shapes, end = _read(header, file)
    if 8 + length + end != size:
        raise InputError(
            f"unreadable weights: has {size} bytes, and its header says {8 + length + end}; "
            f"{_AGAIN}",
            file=file,
        )
    return shapes


def _read(header: Any, file: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes, and where the last tensor ends."""
    shapes, spans = {}, []
    tensors = header.items() if isinstance(header, Mapping) else [("", None)]
    for name, tensor in tensors:
        if name == "__metadata__":
            continue
        try:
            shape = tuple(int(n) for n in tensor["shape"])
            begin, end = (int(n) for n in tensor["data_offsets"])
            bits = _BITS.get(tensor["dtype"])
        except (TypeError, KeyError, ValueError) as error:
            raise InputError("unreadable weights: no such header", file=file, key=name) from error
        if bits is not None and (end - begin) * 8 != prod(shape) * bits:
            raise InputError(
                f"unreadable weights: {end - begin} bytes for the shape {shape}; {_AGAIN}",
                file=file,
                key=name,
            )
        shapes[name] = shape
        spans.append((begin, end))
    last = 0
    for begin, end in sorted(spans):
        if begin != last or end < begin:
            raise InputError(f"unreadable weights: tensors overlap; {_AGAIN}", file=file)
        last = end
    return shapes, last


def refuse_pointer(file: Path) -> None:
    """Raise InputError if the file is what Git LFS leaves in place of a file's content."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS))
    except OSError:
        return  # whoever reads it says so
    if start == _LFS:
        raise InputError(
            "is a pointer of Git LFS and not the file itself: run `git lfs pull` in that folder, "
            "or download the model again",
            file=file,
        )


def _instead(folder: Path) -> str:
    """What lies there in place of the weights that are looked for."""
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    parts = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(PICKLES)]
    if any("-of-" in name for name in parts):
        return f" (safetensors): {parts[0]} is there, but the index or some part is not; {_AGAIN}"
    if parts:
        return f" (safetensors): it has {parts[0]}, which is not a name that transformers reads"
    if pickles:
        return (
            f" (safetensors): {pickles[0]} is a pickle file, which is not read; save the model "
            "with save_pretrained(…, safe_serialization=True)"
        )
    return " (safetensors)"
