"""The interface of a tracker: Weights & Biases, TensorBoard, or a class of the user's.

A tracker shows one run folder in another place. The follower (`follow_run.py`) reads the folder and
calls the tracker, in a process of its own, so that a call may block or fail without any effect on
training. Whatever a tracker raises is retried with back-off, from the step that `open` returns.

One run folder is a group of tracked runs, one for each stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from rcot_rl.monitoring.judgement.alert import Alert
from rcot_rl.monitoring.run_files.run_reader import StageKind


@dataclass(frozen=True)
class TrackedStage:
    """What identifies and describes a stage's tracked run. Equal in every attempt and on any host.

    Attributes:
        run: The run folder.
        run_id: Identifies the folder: the group of its stages' runs.
        stage: Name of the stage.
        config: Nested JSON values to filter by: the resolved recipe, hashes, versions, commit,
            cluster. No secrets.
    """

    run: Path
    run_id: str
    name: str
    """Name of the recipe."""

    stage: str
    kind: StageKind
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    notes: str = ""


@dataclass(frozen=True)
class PictureBox:
    """A box or, if both corners are equal, a point of a picture, in its pixels."""

    corners: tuple[float, float, float, float]
    label: str


@dataclass(frozen=True)
class Picture:
    """An image with overlays that a viewer can toggle.

    Attributes:
        image: uint8 [H, W, 3] RGB.
        boxes: Group, such as `ground truth` or `predicted`, -> boxes and points.
        masks: Group -> bool [H, W].
    """

    image: np.ndarray
    boxes: Mapping[str, Sequence[PictureBox]] = field(default_factory=dict)
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    caption: str = ""


@dataclass(frozen=True)
class DataTable:
    """A table of scalars, texts and pictures."""

    columns: Sequence[str]
    rows: Sequence[Sequence[float | int | str | bool | Picture | None]]


@dataclass(frozen=True)
class Distribution:
    """Counts of values between edges: `len(edges) == len(counts) + 1`."""

    edges: Sequence[float]
    counts: Sequence[float]


Value = float | int | str | DataTable | Distribution | Picture


@dataclass(frozen=True)
class TrackedArtifact:
    """Files that a stage made or used.

    Attributes:
        name: Name within the run folder, such as `shards-grpo-ktg-960` or `model-sft`.
        kind: Type of the artifact.
        path: File or folder.
        role: Whether the stage made or used it; this is the lineage.
        metadata: JSON values, such as the sha256 of a manifest.
    """

    name: str
    kind: Literal["corpus", "shards", "model", "checkpoint", "predictions", "scores", "report"]
    path: Path
    role: Literal["made", "used"]
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Tracker(ABC):
    """Shows run folders in one place. Methods are called from one thread, in the order below.

    Any method may raise. The follower then closes the tracker, waits, and opens the stage again.
    """

    label: ClassVar[str]
    """Name in messages and in the follower's state, such as `wandb`."""

    @abstractmethod
    def open(self, stage: TrackedStage) -> int:
        """Start or resume the stage's run, and return the last step that it already has.

        Args:
            stage: The stage.

        Returns:
            0 if nothing was sent yet, or if this tracker writes the stage again from its start.
        """

    @abstractmethod
    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Send the values of a step; `step` increases with each call.

        Stages without steps send their results as step 1.
        """

    @abstractmethod
    def summarize(self, values: Mapping[str, Value]) -> None:
        """Set values of the whole stage, such as J&F; a later call replaces equal keys."""

    @abstractmethod
    def alert(self, alert: Alert) -> None:
        """Notify the user."""

    def artifact(self, artifact: TrackedArtifact) -> None:  # noqa: B027 - trackers may lack lineage
        """Record files and their lineage."""

    @abstractmethod
    def close(self, state: Literal["running", "done", "failed"]) -> None:
        """Send what is pending and end the session; returns once everything has arrived.

        Args:
            state: `running` if the stage continues later.
        """

    def where(self) -> str:
        """Return the URL of the run folder's group, or the command that sends it; "" if neither."""
        return ""
