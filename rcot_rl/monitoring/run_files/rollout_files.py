"""Read RUN/<stage>/rollouts/STEP.jsonl: the responses of a step, in groups, with their frames."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from rcot_rl.monitoring.run_files.metrics import complete_lines
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.protocol.grounding import parse_grounding
from rcot_rl.protocol.parser import parse_response
from rcot_rl.stats.json_values import is_number
from rcot_rl.stats.rollout_rows import last_turns

if TYPE_CHECKING:
    import numpy as np

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Rollout:
    """One response. Boxes and points are in pixels of the canvas."""

    prompt_id: str
    sample: int
    task: Literal["aks", "ktg", ""]
    prompt: str
    response: str
    answer: str | None
    """Content of the only answer block; None without exactly one."""

    truth: Any
    """Ground truth: `A` or `B`, or a list of boxes and points."""

    reward: float
    components: dict[str, float]
    reasons: list[str]
    advantage: float | None
    """None in dumps of earlier versions."""

    tokens: int | None
    """Length of the response; None in dumps of earlier versions."""

    index: int | None
    """`extra_info.index` of the row: the same prompt has the same index at every step."""

    video: str
    expression_id: str
    outcome: dict[str, Any] = field(default_factory=dict)
    """Outcome of an agentic episode (`rcot_rl.training.agentic.EpisodeOutcome`)."""

    @property
    def true_objects(self) -> list[tuple[Box, Point | None]]:
        """Boxes and points of the ground truth; empty for options."""
        objects = []
        for entry in self.truth if isinstance(self.truth, list) else []:
            try:
                x1, y1, x2, y2 = map(float, entry["bbox_2d"])
                point = entry.get("point_2d")
                objects.append(((x1, y1, x2, y2), None if point is None else (point[0], point[1])))
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                continue
        return objects

    @property
    def predicted_objects(self) -> list[tuple[Box, Point | None]]:
        """Valid boxes of the answer with their points; empty for options."""
        items = parse_grounding(self.answer).items if self.task == "ktg" else ()
        return [(item.box, item.point) for item in items if item.box is not None]


def rollout_steps(stage: Path) -> list[int]:
    """Return the steps whose rollouts are there, ascending."""
    names = [path.stem for path in (stage / "rollouts").glob("*.jsonl")]
    return sorted(int(name) for name in names if name.isdecimal())


def read_rollouts(stage: Path, step: int) -> list[Rollout]:
    """Return the responses of a step, the last turn of each; rows without a reward are left out.

    Returns an empty list if the step has no readable file.
    """
    return read_rollout_file(stage / "rollouts" / f"{step}.jsonl")


def read_rollout_file(path: Path) -> list[Rollout]:
    """Return the responses in a file as `read_rollouts` does; unreadable lines are left out."""
    try:
        lines = complete_lines(path).splitlines()
    except OSError:
        return []
    rows = [row for line in lines if is_number((row := _row(line)).get("reward"))]
    return [as_rollout(row) for row in last_turns(rows, "prompt_id")]


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(row, dict):
        return {}
    if not all(isinstance(row.get(key), int) for key in ("sample", "turn")):
        row.pop("turn", None)
    return row | {"prompt_id": str(row.get("prompt_id"))}


def groups_of(rollouts: Sequence[Rollout]) -> dict[str, list[Rollout]]:
    """Return the responses to each prompt, in the order of the file."""
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt_id, []).append(rollout)
    return groups


class _ClipFrames(msgspec.Struct):
    frames: list[str]


class RolloutFrames:
    """Frames and queries of the rows of a training stage, from the run's shards."""

    def __init__(self, run: Path, stage: str, split: Literal["train", "val"] = "train") -> None:
        self.canvas = 0
        """Side of the canvas in pixels; 0 if unknown."""

        self._rows: dict[int, dict[str, Any]] = {}
        self._folder = run
        self._files: list[Path] = []
        try:
            recipe = RunReader(run).record["recipe"]
            self.canvas = int(recipe["canvas"]["image"])
            self._folder = run / "shards" / recipe["train"][stage]["shard_set"]
            self._files = sorted(self._folder.glob(f"{split}-*.parquet"))
            self._read()
        except (OSError, KeyError, TypeError, ValueError):
            self._rows = {}  # then no frame is found

    def _read(self) -> None:
        import pyarrow.parquet as pq

        for file in self._files:
            columns = [f"extra_info.{name}" for name in ("index", "media", "expression")]
            for row in pq.ParquetFile(file).read(columns).to_pylist():
                self._rows[row["extra_info"]["index"]] = row["extra_info"]

    def path(self, index: int | None) -> Path | None:
        """Return the frame of the row with this `extra_info.index`; None if it is not there."""
        name = self._rows.get(index, {}).get("media") if index is not None else None
        if not isinstance(name, str) or ".." in PurePath(name).parts:
            return None
        path = self._folder / name
        return path if path.is_file() else None

    def clip_path(self, index: int | None, position: int) -> Path | None:
        """Return a frame of the row's clip, at source size; None if the row has no such frame."""
        frames = self._clips.get(index, []) if index is not None else []
        path = Path(frames[position]) if 0 <= position < len(frames) else None
        return path if path is not None and path.is_file() else None

    @cached_property
    def _clips(self) -> dict[int, list[str]]:
        """`extra_info.index` -> paths of the frames of the row's clip; masks are not decoded."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        clips: dict[int, list[str]] = {}
        try:
            for file in self._files:
                columns = ["extra_info.index", "extra_info.clip"]
                for row in pq.ParquetFile(file).read(columns).to_pylist():
                    if text := row["extra_info"].get("clip"):
                        clip = msgspec.json.decode(text, type=_ClipFrames)
                        clips[row["extra_info"]["index"]] = clip.frames
        except (pa.ArrowException, msgspec.MsgspecError, OSError, KeyError, TypeError):
            return {}
        return clips

    def expression(self, index: int | None) -> str:
        """Return the query of the row with this `extra_info.index`; empty if it is not there."""
        return str(self._rows.get(index, {}).get("expression", "")) if index is not None else ""


def read_frame(path: Path) -> np.ndarray | None:
    """Return uint8 [H, W, 3] RGB as stored, without EXIF rotation; None if it is unreadable."""
    import cv2

    return cv2.imread(str(path), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def as_rollout(row: dict[str, Any]) -> Rollout:
    """Return a row of a dump, which must have a reward."""
    source = str(row.get("data_source", ""))
    task = source.rpartition("/")[2]
    response = str(row.get("response", ""))
    parsed = parse_response(response)
    components = row.get("components")
    reasons = row.get("reasons")
    extra = row.get("extra_info")
    outcome = extra.get("agentic") if isinstance(extra, dict) else None
    advantage, tokens, index = (row.get(key) for key in ("advantage", "response_tokens", "index"))
    return Rollout(
        prompt_id=str(row.get("prompt_id")),
        sample=row["sample"] if isinstance(row.get("sample"), int) else 0,
        task=task if task in ("aks", "ktg") else "",  # type: ignore[arg-type]
        prompt=str(row.get("prompt", "")),
        response=response,
        answer=parsed.answer,
        truth=_truth(row.get("ground_truth")),
        reward=float(row["reward"]),
        components={
            str(name): float(value)
            for name, value in (components.items() if isinstance(components, dict) else ())
            if is_number(value)
        },
        reasons=[str(r) for r in reasons] if isinstance(reasons, list) else [],
        advantage=float(advantage) if is_number(advantage) else None,
        tokens=tokens if isinstance(tokens, int) else None,
        index=index if isinstance(index, int) else None,
        video=str(row.get("video", "")),
        expression_id=str(row.get("expression_id", "")),
        outcome=outcome if isinstance(outcome, dict) else {},
    )


def _truth(value: Any) -> Any:
    """Return the parsed ground truth: rows hold it as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
