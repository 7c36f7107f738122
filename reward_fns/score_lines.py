"""`rcot score`: score a JSONL file of responses, line by line.

In:  {"response": str, "ground_truth": …, …}
Out: {"reward": …, "components": {…}, "reasons": […], …the other keys of the line}

A response is never an error, whatever it contains. A line that is not a JSON object, lacks a key or
has a malformed ground truth raises InputError with file and line; no output file is left.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from rcot_rl.errors import InputError
from reward_fns.score import Reward, Score, load_reward

if TYPE_CHECKING:
    from reward_fns.components.mask_iou import MaskSegmenter

NEEDED = ("response", "ground_truth")
OUTPUT_KEYS = ("reward", "components", "reasons")
STDIN = "<stdin>"
STANDARD = "-"
"""Path that stands for standard input or standard output."""


def score_file(
    reward_name: str,
    in_path: str | os.PathLike[str] | None,
    out_path: str | os.PathLike[str] | None,
    overrides: Mapping[str, Any] | None = None,
    segmenter: MaskSegmenter | None = None,
) -> int:
    """Score every line of a file.

    An output file is complete or absent; standard output has the lines scored before an error.
    Raises InputError.

    Args:
        in_path: Input file; None or `-` is standard input.
        out_path: Output file; None or `-` is standard output.
    """
    reward = load_reward(reward_name, overrides=overrides, segmenter=segmenter)
    in_path, out_path = _stream(in_path), _stream(out_path)
    count = 0
    with _reading(in_path) as lines, _writing(out_path) as out:
        for count, line in enumerate(lines, start=1):
            try:
                out.write(score_line(reward, line))
            except InputError as error:
                raise _located(error, in_path, count) from error
    return count


def read_line(in_path: str | os.PathLike[str] | None, number: int) -> dict[str, Any]:
    """Return the object of one line (counted from 1). Raises InputError."""
    in_path = _stream(in_path)
    with _reading(in_path) as lines:
        line = next(itertools.islice(lines, number - 1, None), None)
    try:
        if line is None:
            raise InputError("no such line")
        return _parse(line)
    except InputError as error:
        raise _located(error, in_path, number) from error


def _located(error: InputError, in_path: str | os.PathLike[str] | None, line: int) -> InputError:
    """Return the error with the input file and line added."""
    file = in_path if in_path is not None else STDIN
    return InputError(error.message, file=file, line=line, key=error.key)


def others_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a line that are passed through."""
    return {key: value for key, value in row.items() if key not in NEEDED}


def score_line(reward: Reward, line: bytes) -> bytes:
    """Score one line of JSON; return one line. Raises InputError without file and line."""
    row = _parse(line)
    others = others_of(row)
    score = reward.score(row["response"], row["ground_truth"], **others)
    return _render(score, others)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise InputError(f"not valid JSON: {reason}") from error
    if not isinstance(row, dict):
        raise InputError("must be a JSON object")
    for key in NEEDED:
        if key not in row:
            raise InputError("missing", key=key)
    return row


def _refuse(token: str) -> NoReturn:
    raise ValueError(f"{token} is not JSON")


def _render(score: Score, others: dict[str, Any]) -> bytes:
    row = {"reward": score.reward, "components": score.components, "reasons": score.reasons}
    row.update((key, value) for key, value in others.items() if key not in OUTPUT_KEYS)
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError as error:  # a number such as 1e999, valid JSON but infinite here
        raise InputError("contains a number that does not fit into float64") from error
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, valid JSON only when escaped
        return json.dumps(row).encode() + b"\n"


def _stream(path: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
    """Return None for standard input or output."""
    return None if path is None or os.fspath(path) == STANDARD else path


@contextmanager
def _reading(path: str | os.PathLike[str] | None) -> Iterator[BinaryIO]:
    if path is None:
        yield sys.stdin.buffer
        return
    try:
        stream = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from error
    with stream:
        yield stream


@contextmanager
def _writing(path: str | os.PathLike[str] | None) -> Iterator[BinaryIO]:
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    target = Path(path).resolve()
    special = target.exists() and not target.is_file()  # pipes and devices are written in place
    temporary = target if special else target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        stream = open(temporary, "wb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=path) from error
    try:
        with stream:
            yield stream
        if not special:
            temporary.replace(target)
    except BaseException:
        if not special:
            temporary.unlink(missing_ok=True)
        raise
