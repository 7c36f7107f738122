"""Checks of one shard row: its prompt, image, ground truth, `extra_info` and response."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from PIL import Image

from data_pipelines.tokens import PixelLimits
from rcot_rl.protocol.control_tokens import control_tokens, neutralize
from rcot_rl.protocol.parser import ResponseForm, answer_only_faults, parse_response
from rcot_rl.protocol.prompts import user_turn
from rcot_rl.recipe.schema import DATA_SOURCES

UNREADABLE = (OSError, pa.ArrowException, UnicodeDecodeError)
"""Errors from damaged parquet files; the last one from a damaged column of text."""
RowKey = tuple[str, str, str, int]
"""(dataset, video, expression, frame index)."""
RowFault = tuple[str, str]
"""(key, message)."""


def is_file(path: Path) -> bool:
    """Return True for a file; False if the system refuses the path (too long, null byte)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def row_key(info: Mapping[str, Any]) -> RowKey:
    """Return the identity of a row's instance."""
    return (
        str(info.get("dataset")),
        str(info.get("video")),
        str(info.get("expression_id")),
        int(info.get("frame_index") or 0),
    )


def row_kind(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return (task, option, target, dataset), by which rows are counted."""
    info = row["extra_info"] or {}
    truth = _json((row["reward_model"] or {}).get("ground_truth"))
    option = truth if isinstance(truth, str) else ""
    return (
        str(info.get("task")),
        option,
        str(info.get("target")),
        str(info.get("dataset")),
    )


def check_row(
    row: Mapping[str, Any],
    folder: Path,
    split: str,
    manifest: Mapping[str, Any],
    extra_control: tuple[str, ...] = (),
) -> Iterator[RowFault]:
    """Yield every fault of a row that has the right schema.

    Args:
        extra_control: Control tokens of the policy's tokenizer beyond the known ones.
    """
    info = row["extra_info"]
    counted = manifest.get("tokens") is not None
    optional = () if counted else ("vision_tokens", "prompt_tokens", "total_tokens")
    missing = ["extra_info"]
    if info:
        missing = [k for k, v in info.items() if v is None and k not in optional]
    if missing:
        yield (f"extra_info.{missing[0]}", "missing")
        return
    shapeless = [k for k in ("canvas", "source_size") if not _integers(info[k], 2)]
    if shapeless:
        yield (f"extra_info.{shapeless[0]}", f"{info[shapeless[0]]} is not [H, W]")
        return
    yield from _check_details(row, info, split, manifest)
    yield from _check_prompt(row["prompt"], row["images"], "prompt")
    for name in ("prompt", "messages"):
        yield from _check_control(row.get(name), info, name, extra_control)
    yield from _check_image(row["images"], info, folder, manifest)
    truth = _json((row["reward_model"] or {}).get("ground_truth"))
    yield from check_truth(truth, info)
    if "messages" in row:
        form = (manifest["recipe"].get("data") or {}).get("response", "think_answer")
        yield from _check_messages(row, truth, form)
    if counted:
        yield from _check_lengths(info, manifest["tokens"])


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def _check_details(
    row: Mapping[str, Any], info: Mapping[str, Any], split: str, manifest: Mapping[str, Any]
) -> Iterator[RowFault]:
    if DATA_SOURCES.get(info["task"]) is None:
        yield ("extra_info.task", f"'{info['task']}' is neither aks nor ktg")
    elif row["data_source"] != DATA_SOURCES[info["task"]]:
        yield ("data_source", f"'{row['data_source']}' does not belong to task {info['task']}")
    if info["split"] != split:
        yield ("extra_info.split", f"'{info['split']}' in a file of {split}")
    kind = ("none", "single", "multi")[min(len(info["object_ids"]), 2)]
    if info["target"] != kind:
        yield ("extra_info.target", f"'{info['target']}', but the expression's is '{kind}'")
    side = manifest["recipe"].get("canvas")
    if info["canvas"] != [side, side]:
        yield ("extra_info.canvas", f"{info['canvas']}, but the manifest's is {side}")
    if min(info["source_size"]) < 1:
        yield ("extra_info.source_size", f"{info['source_size']} is not [H, W]")
    if (row["reward_model"] or {}).get("style") != "rule":
        yield ("reward_model.style", "must be 'rule'")


def _check_prompt(turns: Any, images: Any, key: str) -> Iterator[RowFault]:
    if not turns or any(not t or not t["role"] or not t["content"] for t in turns):
        yield (key, "must be a list of turns with role and content")
        return
    if turns[0]["role"] != "user":
        yield (f"{key}[0].role", "must be user")
    for name, expected in (("image", len(images or [])), ("video", 0), ("audio", 0)):
        count = sum(t["content"].count(f"<{name}>") for t in turns)
        if count != expected:
            yield (key, f"{count} <{name}>, expected {expected}")


def _check_control(
    turns: Any, info: Mapping[str, Any], key: str, extra_control: tuple[str, ...]
) -> Iterator[RowFault]:
    """Yield control tokens of the model, media placeholders of verl, and tags inside texts."""
    for number, turn in enumerate(turns or []):
        content = (turn or {}).get("content") or ""
        text = content.removeprefix(user_turn("", "image")) if number == 0 else content
        tokens = control_tokens(text, extra_control, keep_tags=True)
        if number == 0:
            # the prompt's template has tags; the texts quoted in it must not
            for quoted in (info[name].strip() for name in ("expression", "description")):
                if quoted in text and neutralize(quoted, extra_control) not in text:
                    tokens += control_tokens(quoted, extra_control)
        if tokens:
            named = ", ".join(dict.fromkeys(tokens))
            message = f"holds control tokens: {named}; rebuild the set with `rcot data build`"
            yield (f"{key}[{number}].content", message)


def _check_image(
    images: Any, info: Mapping[str, Any], folder: Path, manifest: Mapping[str, Any]
) -> Iterator[RowFault]:
    if not images or len(images) != 1 or not images[0]:
        yield ("images", "must be exactly one image")
        return
    media = info["media"]
    if media.startswith("/") or ".." in PurePosixPath(media).parts or "\0" in media:
        yield ("extra_info.media", "points outside the set")
        return
    if media not in manifest["files"]:
        yield ("extra_info.media", f"{media} is not in the manifest")
    if "bytes" in images[0]:
        data = images[0]["bytes"] or b""
        if hashlib.sha256(data).hexdigest() != manifest["files"].get(media):
            yield ("images[0].bytes", f"differ from {media}")
        yield from _check_picture(data, info)
        return
    path = Path(images[0]["image"] or "")
    if not is_file(path):
        yield ("images[0].image", f"no such file: {path}")
    elif path.resolve() != (folder / media).resolve():
        yield ("images[0].image", f"is not {media} of this set")
    else:
        yield from _check_picture(path.read_bytes(), info)


def _check_picture(data: bytes, info: Mapping[str, Any]) -> Iterator[RowFault]:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as image:
            size = [image.height, image.width]
            image.verify()
    except Exception as error:  # Pillow's plug-ins raise many types for broken files
        yield ("images[0]", f"not a picture: {error}")
        return
    if size != info["canvas"]:
        yield ("images[0]", f"{size}, but the canvas is {info['canvas']}")


def _check_lengths(info: Mapping[str, Any], tokens: Mapping[str, Any]) -> Iterator[RowFault]:
    """Check stored lengths against the processor's vision tokens and the training limits."""
    limits = PixelLimits(**tokens["pixels"])
    try:
        vision = limits.vision_tokens(*info["canvas"])
    except ValueError as error:
        yield ("extra_info.canvas", str(error))
        return
    if info["vision_tokens"] != vision:
        yield ("extra_info.vision_tokens", f"{info['vision_tokens']}, but the canvas has {vision}")
    if not vision < info["prompt_tokens"] <= info["total_tokens"]:
        yield ("extra_info.prompt_tokens", "is not between the vision and the total tokens")
    for name, most in tokens["limits"].items():
        if info[name] > most:
            yield (f"extra_info.{name}", f"{info[name]}, but training accepts at most {most}")


def check_truth(truth: Any, info: Mapping[str, Any]) -> Iterator[RowFault]:
    """Yield every fault of a row's ground truth."""
    key = "reward_model.ground_truth"
    if info["task"] == "aks":
        if truth not in ("A", "B"):
            yield (key, 'must be "A" or "B" in JSON')
        return
    if not isinstance(truth, list):
        yield (key, "must be a JSON list")
        return
    if (info["target"] == "none") != (not truth):
        yield (key, f"{len(truth)} objects for the target '{info['target']}'")
    if len(truth) > len(info["object_ids"]):
        yield (key, f"{len(truth)} objects, {len(info['object_ids'])} targets")
    for number, item in enumerate(truth):
        yield from _check_item(item, info["canvas"], f"{key}[{number}]")


def _check_item(item: Any, canvas: list[int], key: str) -> Iterator[RowFault]:
    item = item if isinstance(item, dict) else {}
    box: Any = item.get("bbox_2d")
    point: Any = item.get("point_2d")
    if not _integers(box, 4) or not _integers(point, 2):
        yield (key, "needs bbox_2d of four and point_2d of two integers")
        return
    x1, y1, x2, y2 = box
    height, width = canvas
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        yield (f"{key}.bbox_2d", f"{box} is not a box on the canvas")
    elif not (x1 <= point[0] <= x2 and y1 <= point[1] <= y2):
        yield (f"{key}.point_2d", f"{point} is outside {box}")


def _integers(value: Any, n: int) -> bool:
    return isinstance(value, list) and len(value) == n and all(type(v) is int for v in value)


def _check_messages(row: Mapping[str, Any], truth: Any, form: ResponseForm) -> Iterator[RowFault]:
    turns = row["messages"]
    yield from _check_prompt(turns, row["images"], "messages")
    if not turns or [t["role"] if t else None for t in turns] != ["user", "assistant"]:
        yield ("messages", "must be a user turn and an assistant turn")
        return
    if turns[:1] != row["prompt"]:
        yield ("messages[0]", "differs from the prompt")
    response = turns[1]["content"] or ""
    parsed = parse_response(response)
    faults = parsed.faults if form == "think_answer" else answer_only_faults(response)
    if faults:
        yield ("messages[1].content", f"not well formed: {', '.join(faults)}")
    elif truth is not None and parsed.answer != truth and _json(parsed.answer) != truth:
        yield ("messages[1].content", "its answer differs from the ground truth")
