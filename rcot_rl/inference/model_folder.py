"""Checkpoint folders of the policy: found, checked and compared before an engine touches them.

vLLM takes half a minute to find out that a tokenizer is missing, says so in a traceback, and loads
half a set of weights with no more than a warning; here each fault has a name and a file.

Left out: weights in pickle files (`pytorch_model.bin`), which can run code when they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from rcot_rl.errors import InputError
from rcot_rl.inference.weights import refuse_pointer, weight_files, weight_shapes
from rcot_rl.paths import check_path
from rcot_rl.recipe.base import Section

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny-qwen2.5-vl"
CARD = "rcot.json"
"""Optional file of a checkpoint: how the policy was trained to be asked."""

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
    image_canvas: int = Field(default=840, gt=0, multiple_of=28)
    video_canvas: int = Field(default=448, gt=0, multiple_of=28)


def find_model(spec: str | Path) -> Path:
    """The folder of a policy: `tiny` (the shipped one), a folder, or a hub id, then downloaded.

    Raises InputError when there is no such folder and the hub does not give one.
    """
    if str(spec) == "tiny":
        return TINY
    path = Path(spec)
    name = str(spec)
    if path.exists() or path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"no such folder, and not to be had from the hub: {reason}", file=name
        ) from error


def local_model(spec: str | Path) -> Path | None:
    """`find_model` without the network: None for a hub id that was not downloaded before."""
    if str(spec).count("/") != 1 or Path(spec).exists() or str(spec).startswith("."):
        path = find_model(spec)
        return path if path.is_dir() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(spec), local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError):
        return None


def check_model(path: Path) -> None:
    """Raise InputError, naming the file, unless `path` is a whole Qwen2.5-VL checkpoint.

    A path that vLLM would read as a pattern is refused too: it would load another folder's weights.
    """
    check_path(path, handed_on=True)
    if path.is_file():
        raise InputError("is a file; name the folder of the whole model", file=path)
    if not path.is_dir():
        raise InputError("no such model folder", file=path)
    for names, what in _ANY_OF:
        present = [path / name for name in names if (path / name).is_file()]
        if not present:
            wanted = " or ".join(names)
            raise InputError(f"the model folder lacks {what} ({wanted})", file=path / names[0])
        for file in present:
            refuse_pointer(file)
    config = _read_json(path / "config.json")
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
    """The checkpoint's `rcot.json`, None without one. Raises InputError for a broken one."""
    file = path / CARD
    if not file.is_file():
        return None
    try:
        return PolicyCard.model_validate(_read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(first["msg"], file=file, key=".".join(map(str, first["loc"]))) from error


def check_same_model(running: Path, other: Path) -> None:
    """Raise InputError unless weights of `other` can take the place of those of `running`.

    Network, tokenizer, chat template and the tensors' shapes must be equal: else an engine started
    for `running` would compute something else, or die half way through the weights.
    """
    from transformers import AutoConfig, AutoTokenizer

    ours, theirs = (AutoConfig.from_pretrained(p).to_dict() for p in (running, other))
    key = _first_difference(ours, theirs)
    if key is not None:
        raise InputError(f"differs from {running}", file=other / "config.json", key=key)
    tokenizers = [AutoTokenizer.from_pretrained(p) for p in (running, other)]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise InputError(f"another vocabulary than {running}", file=other / "tokenizer.json")
    if tokenizers[0].chat_template != tokenizers[1].chat_template:
        file = other / "tokenizer_config.json"
        raise InputError(f"another chat template than {running}", file=file)
    _check_same_tensors(weight_shapes(running), weight_shapes(other), other)


def fingerprint(path: Path) -> str:
    """sha256 of a checkpoint's weights, wherever it lies: which model it is. Raises InputError."""
    digest = hashlib.sha256()
    for file in weight_files(path):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _check_same_tensors(
    ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], other: Path
) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        if name == "lm_head.weight" and not (name in ours and name in theirs):
            continue  # tied to the embeddings: some savers write it, some do not
        if ours.get(name) != theirs.get(name):
            was, now = ours.get(name, "absent"), theirs.get(name, "absent")
            raise InputError(f"tensor is {now}, the engine's is {was}", file=other, key=name)


def _first_difference(ours: Any, theirs: Any, prefix: str = "") -> str | None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted((ours.keys() | theirs.keys()) - _VOLATILE):
            found = _first_difference(ours.get(key), theirs.get(key), f"{prefix}{key}.")
            if found is not None:
                return found
        return None
    return None if ours == theirs else prefix.rstrip(".")


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    return "chat_template" in _read_json(path / "tokenizer_config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"not readable as JSON: {error}", file=path) from error
    if not isinstance(value, dict):
        raise InputError("must be a JSON object", file=path)
    return value
