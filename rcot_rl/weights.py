"""Checks of safetensors weights: all parts are present, and each file is complete.

Reads only headers (no tensor, no torch), so that a Git LFS pointer or a partial download is
reported before anything is loaded. Not supported: pickle files, which can run code when read.
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
_DTYPES = {
    8: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
    16: ("U16", "I16", "F16", "BF16"),
    32: ("U32", "I32", "F32"),
    64: ("U64", "I64", "F64"),
}
_BITS = {dtype: bits for bits, dtypes in _DTYPES.items() for dtype in dtypes}
_AGAIN = "copy or download it again"


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a checkpoint folder.

    Raises:
        InputError: Weights are missing, incomplete, or not safetensors; the error names the file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        shapes |= tensors_of(file)
    for name, part in (weight_map(folder) or {}).items():
        if name not in shapes:
            raise InputError(
                f"the index lists it in {part}, which does not have it; {_AGAIN}",
                file=folder / "model.safetensors.index.json",
                key=name,
            )
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder.

    Raises:
        InputError: A file is missing.
    """
    index = weight_map(folder)
    names = ["model.safetensors"] if index is None else sorted(set(index.values()))
    for name in names:
        if not (folder / name).is_file():
            raise InputError(
                f"the model folder lacks weights{_alternatives(folder)}", file=folder / name
            )
    return [folder / name for name in names]


def weight_map(folder: Path) -> dict[str, str] | None:
    """Return tensor name -> file name from the index of sharded weights; None without an index.

    Raises:
        InputError: The index is not valid.
    """
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
        raise InputError("must map tensor names to file names", file=index, key="weight_map")
    return {name: Path(file).name for name, file in table.items()}


def tensors_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of one file, after comparing its size with its header.

    Raises:
        InputError: The file is incomplete, or not safetensors.
    """
    refuse_pointer(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if head[:2] == b"PK" or head[:1] == b"\x80":
                raise InputError(
                    "unreadable weights: a PyTorch pickle file, not safetensors; save the model "
                    "with save_pretrained(…, safe_serialization=True)",
                    file=file,
                )
            if size < 8 or length > _MAX_HEADER or 8 + length > size:
                raise InputError(
                    f"unreadable weights: truncated, or not safetensors ({size} bytes); {_AGAIN}",
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
            f"unreadable weights: has {size} bytes, expected {8 + length + end}; {_AGAIN}",
            file=file,
        )
    return shapes


def _read(header: Any, file: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return the tensors' shapes, and the offset at which the last one ends."""
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int]] = []
    if not isinstance(header, Mapping):
        raise InputError("unreadable weights: the header is not a JSON object", file=file)
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        try:
            shape = tuple(int(n) for n in tensor["shape"])
            begin, end = (int(n) for n in tensor["data_offsets"])
            bits = _BITS.get(tensor["dtype"])
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(
                "unreadable weights: invalid tensor in the header", file=file, key=name
            ) from error
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
    """Check that a file is not a Git LFS pointer.

    Raises:
        InputError: It is one.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS))
    except OSError:
        return  # reported by whoever reads it
    if start == _LFS:
        raise InputError(
            "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or "
            "download the model again",
            file=file,
        )


def _alternatives(folder: Path) -> str:
    """Return an explanation that names other weights of the folder."""
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    parts = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(PICKLES)]
    if any("-of-" in name for name in parts):
        return f" (safetensors): it has {parts[0]}, but the index or a part is missing; {_AGAIN}"
    if parts:
        return f" (safetensors): it has {parts[0]}, a name that transformers does not read"
    if pickles:
        return (
            f" (safetensors): {pickles[0]} is a pickle file, which is not supported; save the "
            "model with save_pretrained(…, safe_serialization=True)"
        )
    return " (safetensors)"
