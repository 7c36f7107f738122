"""Rewards on held-out prompts, to compare checkpoints on the same rows (section 4.4).

Every checkpoint answers the same validation rows: `k` samples at the training temperature, with one
fixed seed per prompt, and one greedy response. Means per prompt are kept, so that checkpoints can
be compared as pairs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import cv2
import numpy as np

from rcot_rl.errors import InputError
from rcot_rl.inference.policy import PolicyRequest
from rcot_rl.prediction_layout import Way
from reward_fns.score import Reward, Score

PLACEHOLDER = "<image>"


class Rewards(TypedDict):
    """Rewards of one sampling method."""

    mean: float
    per_prompt: list[float]
    """Mean over each prompt's responses, in row order."""
    components: dict[str, float]
    """Mean of each unweighted component."""


class Heldout(TypedDict):
    """Rewards of one checkpoint on the held-out rows of one task."""

    prompts: list[str]
    """A name per row (`extra_info.index` if present, else its position), to pair results by."""
    sampled: Rewards
    greedy: Rewards
    components: dict[str, float]
    """Components of the samples."""


class ScoredHeldout(NamedTuple):
    """Result of `score_heldout`."""

    rewards: Heldout
    responses: dict[Way, list[dict[str, Any]]]
    """The scored responses, with the keys of a line of RUN/<stage>/rollouts/STEP.jsonl."""


def read_rows(
    shards: Sequence[Path], limit: int | None = None, task: str | None = None
) -> list[dict[str, Any]]:
    """Return the first `limit` rows of shards, with absolute image paths. Raises InputError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for shard in shards:
        if not shard.is_file():
            raise InputError("no such shard", file=shard)
        try:
            shard_rows = pq.read_table(shard).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"not a readable parquet file: {error}", file=shard) from error
        if task is not None:
            data_source = f"rcot/{task}"
            shard_rows = [row for row in shard_rows if row.get("data_source") == data_source]
        for row in shard_rows:
            for image in row.get("images") or []:
                _resolve(image, shard.parent)
        rows += shard_rows
        if limit is not None and len(rows) >= limit:
            return rows[:limit]
    if not rows:
        raise InputError("no rows", file=shards[0] if shards else None)
    return rows


def heldout_requests(
    rows: Sequence[Mapping[str, Any]], seed: int = 0, first: int = 0, last: int | None = None
) -> list[PolicyRequest]:
    """Return the requests of verl RL rows, each with one user message that starts with its image.

    Args:
        seed: The prompts' seeds derive from it.
        first, last: Positions of the first row to take, and of the first one not to take.

    Raises:
        InputError: A row is invalid; the error names row and key.
    """
    if not rows:
        raise InputError("no held-out rows to compare on")
    return [_request(rows[index], index, seed) for index in range(len(rows))[first:last]]


def score_heldout(
    rows: Sequence[Mapping[str, Any]],
    sampled: list[list[str]],
    greedy: list[list[str]],
    reward: Reward,
    count: Callable[[str], int] | None = None,
) -> ScoredHeldout:
    """Score the responses to held-out rows of one task.

    Args:
        sampled: k responses per row.
        greedy: One response per row.
        count: Return the number of tokens of a text; rewards then get `response_length` and
            `num_turns` as in training.

    Raises:
        InputError: A row is invalid; the error names row and key.
    """
    of_samples, sampled_lines = _score(rows, sampled, reward, count)
    of_greedy, greedy_lines = _score(rows, greedy, reward, count)
    rewards = Heldout(
        prompts=[_name(row, index) for index, row in enumerate(rows)],
        sampled=of_samples,
        greedy=of_greedy,
        components=of_samples["components"],
    )
    return ScoredHeldout(rewards, {"sampled": sampled_lines, "greedy": greedy_lines})


def _score(
    rows: Sequence[Mapping[str, Any]],
    responses: list[list[str]],
    reward: Reward,
    count: Callable[[str], int] | None,
) -> tuple[Rewards, list[dict[str, Any]]]:
    per_prompt, components, lines = [], [], []
    for index, (row, choices) in enumerate(zip(rows, responses, strict=True)):
        scores = [_scored(row, index, response, reward, count) for response in choices]
        per_prompt.append(float(np.mean([score.reward for score in scores])))
        components += [score.components for score in scores]
        for sample, (response, score) in enumerate(zip(choices, scores, strict=True)):
            line = _line(row, index, sample, response, score)
            lines.append(line | ({} if count is None else {"response_tokens": count(response) + 1}))
    names = dict.fromkeys(name for values in components for name in values)
    rewards = Rewards(
        mean=float(np.mean(per_prompt)),
        per_prompt=per_prompt,
        components={n: float(np.mean([c[n] for c in components if n in c])) for n in names},
    )
    return rewards, lines


def _line(
    row: Mapping[str, Any], index: int, sample: int, response: str, score: Score
) -> dict[str, Any]:
    """Return a scored response as training writes its rollouts."""
    extra = row.get("extra_info")
    info = extra if isinstance(extra, Mapping) else {}
    return {
        "prompt_id": _name(row, index),
        "sample": sample,
        "data_source": row.get("data_source"),
        "prompt": _get(row, index, "prompt")[0]["content"],
        "response": response,
        "ground_truth": _get(row, index, "reward_model", "ground_truth"),
        "reward": score.reward,
        "components": score.components,
        "reasons": score.reasons,
        **{key: info.get(key) for key in ("index", "video", "expression_id")},
    }


def _scored(
    row: Mapping[str, Any],
    index: int,
    response: str,
    reward: Reward,
    count: Callable[[str], int] | None,
) -> Score:
    # as rcot_rl/training/reward_manager.py adds them to a row; it counts the end token
    added = {} if count is None else {"response_length": count(response) + 1, "num_turns": 2}
    truth = _get(row, index, "reward_model", "ground_truth")
    try:
        return reward.score(
            response,
            truth,
            data_source=row.get("data_source"),
            extra_info=row.get("extra_info"),
            **added,
        )
    except InputError as error:
        raise InputError(error.message, key=f"row {index}: {error.key}") from error


def _request(row: Mapping[str, Any], index: int, seed: int) -> PolicyRequest:
    """Return the row's prompt and image as the rollouts show them."""
    prompt, images = _get(row, index, "prompt"), _get(row, index, "images")
    turns = prompt if isinstance(prompt, list) else []
    turns = [m if isinstance(m, Mapping) else {} for m in turns]
    texts = [m.get("content") for m in turns]
    if len(texts) != 1 or turns[0].get("role") != "user" or not isinstance(texts[0], str):
        raise InputError("must be one user message", key=f"row {index}: prompt")
    text = texts[0]
    has_one_image = isinstance(images, list) and len(images) == 1
    if not has_one_image or not text.startswith(PLACEHOLDER) or text.count(PLACEHOLDER) != 1:
        raise InputError("must begin with its only image", key=f"row {index}: prompt")
    text = text.removeprefix(PLACEHOLDER)
    image = _image(images[0], index)
    return PolicyRequest(text, image=image, seed=zlib.crc32(f"{seed}\0{index}\0{text}".encode()))


def _image(value: Any, index: int) -> np.ndarray:
    """Return uint8 [H, W, 3] RGB from `{"bytes": …}` or `{"path" | "image": …}`."""
    key = f"row {index}: images"
    if not isinstance(value, dict):
        raise InputError("must be an object with bytes or a path", key=key)
    path = value.get("path") or value.get("image")
    if value.get("bytes"):
        data, file = value["bytes"], None
    elif isinstance(path, str):
        file = Path(path.removeprefix("file://"))
        if not file.is_file():
            raise InputError("no such image", file=file, key=key)
        data = file.read_bytes()
    else:
        raise InputError("must be an object with bytes or a path", key=key)
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if bgr is None:
        raise InputError("not a readable image", file=file, key=key)
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _resolve(image: Any, folder: Path) -> None:
    """Make an image's relative paths, which are relative to their shard, absolute."""
    if not isinstance(image, dict):
        return
    for key in ("path", "image"):
        path = image.get(key)
        if isinstance(path, str) and not path.startswith("file://"):
            image[key] = str(folder / path)


def _name(row: Mapping[str, Any], index: int) -> str:
    extra = row.get("extra_info")
    return str(extra.get("index", index) if isinstance(extra, Mapping) else index)


def _get(row: Mapping[str, Any], index: int, *keys: str) -> Any:
    value: Any = row
    for depth, key in enumerate(keys):
        if not isinstance(value, Mapping) or value.get(key) is None:
            raise InputError("missing", key=f"row {index}: {'.'.join(keys[: depth + 1])}")
        value = value[key]
    return value
