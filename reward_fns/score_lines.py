"""`rcot score`: scores a JSONL file of responses, a line at a time (section 2 of the contracts).

In:  {"response": str, "ground_truth": …, …}
Out: {"reward": …, "components": {…}, "reasons": […], …the other keys of the line}

A response is never an error, whatever it holds. A line that is not a JSON object, lacks a key or
has a broken ground truth is: InputError with file and line, and no output file is left.
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
    from reward_fns.components.mask_iou import Segmenter

NEEDED = ("response", "ground_truth")
OURS = ("reward", "components", "reasons")
STDIN = "<stdin>"
STANDARD = "-"
"""As a path: standard input or standard output, as elsewhere on a command line."""


def score_file(
    reward_name: str,
    in_path: str | os.PathLike[str] | None,
    out_path: str | os.PathLike[str] | None,
    overrides: Mapping[str, Any] | None = None,
    segmenter: Segmenter | None = None,
) -> int:
    """Score every line of a file, or of standard input when None or `-`; write to a file, or to
    standard output when None or `-`. Returns the number of lines. Raises InputError.

    An output file appears whole or not at all; standard output has what was scored so far.
    """
    reward = load_reward(reward_name, overrides=overrides, segmenter=segmenter)
    in_path, out_path = _stream(in_path), _stream(out_path)
    count = 0
    with _reading(in_path) as lines, _writing(out_path) as out:
        for count, line in enumerate(lines, start=1):
            try:
                out.write(score_line(reward, line))
            except InputError as error:
                file = in_path if in_path is not None else STDIN
                raise InputError(error.message, file=file, line=count, key=error.key) from error
    return count


def read_line(in_path: str | os.PathLike[str] | None, number: int) -> dict[str, Any]:
    """One line's keys (from 1) as `Reward.score` takes them by name. Raises InputError."""
    in_path = _stream(in_path)
    file = in_path if in_path is not None else STDIN
    with _reading(in_path) as lines:
        line = next(itertools.islice(lines, number - 1, None), None)
    if line is None:
        raise InputError("there is no such line", file=file, line=number)
    try:
        row = _parse(line)
        for key in NEEDED:
            if key not in row:
                raise InputError("missing", key=key)
    except InputError as error:
        raise InputError(error.message, file=file, line=number, key=error.key) from error
    return row


def others_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line's keys beside those that are scored."""
    return {key: value for key, value in row.items() if key not in NEEDED}


def score_line(reward: Reward, line: bytes) -> bytes:
    """One line in, one line out. Raises InputError without file and line."""
    row = _parse(line)
    for key in NEEDED:
        if key not in row:
            raise InputError("missing", key=key)
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
    return row


def _refuse(token: str) -> NoReturn:
    raise ValueError(f"{token} is not JSON")


def _render(score: Score, others: dict[str, Any]) -> bytes:
    row = {"reward": score.reward, "components": score.components, "reasons": score.reasons}
    row.update((key, value) for key, value in others.items() if key not in OURS)
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError as error:  # a number such as 1e999, valid JSON but infinite here
        raise InputError("holds a number that does not fit") from error
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, valid JSON only when escaped
        return json.dumps(row).encode() + b"\n"


def _stream(path: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
    """None for standard input or output, however it was asked for."""
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
    special = target.exists() and not target.is_file()  # a pipe or a device is not replaced
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
