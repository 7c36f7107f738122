"""Checkpoint folders of the policy: located, checked and compared before an engine reads them.

vLLM takes half a minute to notice a missing tokenizer, reports it as a traceback, and only warns
about an incomplete set of weights. Here each fault names its file.

Not supported: weights in pickle files (`pytorch_model.bin`), which can run code when read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from rcot_rl.errors import InputError
from rcot_rl.protocol.parser import ResponseForm
from rcot_rl.recipe.base import Section
from rcot_rl.system.files import read_json_object
from rcot_rl.system.paths import check_path
from rcot_rl.weights import refuse_pointer, weight_files, weight_shapes

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
TINY = _ASSETS / "tiny-qwen2.5-vl"
TINY_TRAINED = _ASSETS / "tiny-rcot-seg"
SHIPPED = {"tiny": TINY, "tiny-trained": TINY_TRAINED}
"""Name -> policy of the package: the base of trainings, and the result of the laptop recipe."""
CARD = "rcot.json"
"""Optional file of a checkpoint: the prompts and canvases of its training."""

_ANY_OF = (
    (("config.json",), "the model's configuration"),
    (("tokenizer.json", "vocab.json"), "a tokenizer"),
    (("tokenizer_config.json",), "the tokenizer's configuration"),
    (("preprocessor_config.json", "processor_config.json"), "an image processor"),
)
_VOLATILE = frozenset(
    {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures"}
)
"""Keys of a configuration that do not change what the network computes."""


class PolicyCard(Section):
    """`rcot.json` of a checkpoint: the prompts and canvases that it was trained with."""

    prompts: str = "qwen"
    response: ResponseForm = "think_answer"
    image_canvas: int = Field(default=840, gt=0, multiple_of=28)
    video_canvas: int = Field(default=448, gt=0, multiple_of=28)


def is_hub_id(spec: str) -> bool:
    """Return True if `spec` can only mean a model of the hub."""
    path = Path(spec)
    local = path.exists() or path.is_absolute() or spec.startswith(".")
    return not local and spec.count("/") == 1


def find_model(spec: str | Path) -> Path:
    """Return the folder of a policy. Raises InputError.

    Args:
        spec: `tiny` or `tiny-trained` (shipped), a folder, or a hub id, which is downloaded.
    """
    name = str(spec)
    if name in SHIPPED:
        return SHIPPED[name]
    if not is_hub_id(name):
        return Path(spec)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"no such folder, and the hub download failed: {reason}", file=name
        ) from error


def local_model(spec: str | Path) -> Path | None:
    """Return `find_model` without the network; None: no such folder, or not downloaded yet."""
    if not is_hub_id(str(spec)):
        path = find_model(spec)
        return path if path.is_dir() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(spec), local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError):
        return None


def check_model(path: Path) -> None:
    """Check that `path` is a complete Qwen2.5-VL checkpoint.

    Raises:
        InputError: It is not; the error names the file. Also for a path that vLLM would read as a
            glob pattern, because it would load another folder's weights.
    """
    check_path(path, handed_on=True)
    if path.is_file():
        raise InputError("is a file; name the model's folder", file=path)
    if not path.is_dir():
        raise InputError("no such model folder", file=path)
    for names, content in _ANY_OF:
        present = [path / name for name in names if (path / name).is_file()]
        if not present:
            expected = " or ".join(names)
            raise InputError(f"the model folder lacks {content} ({expected})", file=path / names[0])
        for file in present:
            refuse_pointer(file)
    config = read_json_object(path / "config.json")
    if config.get("model_type") != "qwen2_5_vl":
        raise InputError(
            f"not a Qwen2.5-VL model (is {config.get('model_type')!r})",
            file=path / "config.json",
            key="model_type",
        )
    if not _has_chat_template(path):
        raise InputError(
            "the model folder lacks a chat template", file=path / "chat_template.jinja"
        )
    weight_shapes(path)


def read_card(path: Path) -> PolicyCard | None:
    """Return the checkpoint's `rcot.json`; None without one. Raises InputError."""
    file = path / CARD
    if not file.is_file():
        return None
    try:
        return PolicyCard.model_validate(read_json_object(file))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(first["msg"], file=file, key=".".join(map(str, first["loc"]))) from error


def check_same_model(running: Path, other: Path) -> None:
    """Check that an engine started on `running` can load the weights of `other`.

    Network, tokenizer, chat template and tensor shapes must be equal. Otherwise the engine would
    compute something else, or fail in the middle of the weights. Raises InputError.
    """
    from transformers import AutoConfig, AutoTokenizer

    configs = [AutoConfig.from_pretrained(p).to_dict() for p in (running, other)]
    key = _first_difference(*configs)
    if key is not None:
        raise InputError(f"differs from {running}", file=other / "config.json", key=key)
    tokenizers = [AutoTokenizer.from_pretrained(p) for p in (running, other)]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise InputError(f"vocabulary differs from {running}", file=other / "tokenizer.json")
    if tokenizers[0].chat_template != tokenizers[1].chat_template:
        file = other / "tokenizer_config.json"
        raise InputError(f"chat template differs from {running}", file=file)
    _check_same_tensors(weight_shapes(running), weight_shapes(other), other)


def fingerprint(path: Path) -> str:
    """Return the sha256 of a checkpoint's weights, whatever its folder. Raises InputError."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _check_same_tensors(
    running: Mapping[str, tuple[int, ...]], loaded: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    for name in sorted(running.keys() | loaded.keys()):
        if name == "lm_head.weight" and not (name in running and name in loaded):
            continue  # tied to the embeddings: some savers write it, some do not
        old, new = running.get(name, "absent"), loaded.get(name, "absent")
        if old != new:
            raise InputError(f"tensor is {new}, the engine's is {old}", file=folder, key=name)


def _first_difference(a: Any, b: Any, prefix: str = "") -> str | None:
    """Return the dotted key of the first difference between two configurations; None if equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted((a.keys() | b.keys()) - _VOLATILE):
            difference = _first_difference(a.get(key), b.get(key), f"{prefix}{key}.")
            if difference is not None:
                return difference
        return None
    return None if a == b else prefix.rstrip(".")


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    return "chat_template" in read_json_object(path / "tokenizer_config.json")
