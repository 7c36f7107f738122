"""RUN/tracking/<tracker>.json: how far a follower came, for the next one and for the command."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rcot_rl.monitoring.run_files.run_reader import RunReader, as_mapping, read_json
from rcot_rl.recipe.tracking_section import TRACKING
from rcot_rl.system.files import write_text


@dataclass
class SentStage:
    """What a tracker received of one stage."""

    last_step: int = 0
    """Last step that was handed to the tracker; 1 for the results of a stage without steps."""

    steps: int = 0
    """Number of steps that were handed to the tracker."""

    arrived: int = 0
    """`steps` when the tracker was last closed without an error."""

    closed: Literal["", "running", "done", "failed"] = ""
    """State with which the tracker was last closed; empty while it is open."""

    results: str = ""
    """Digest of the summary and the artifacts that were sent."""

    stamp: str = ""
    """Sizes and times of the files that the results depend on, when they were last looked at."""

    alerts: list[list[Any]] = field(default_factory=list)
    """Code, step and number of each alert that was sent."""

    faults: int = 0
    """Steps whose pictures or tables could not be made; their scalars were sent."""


@dataclass
class TrackerState:
    """How far the follower of one tracker came."""

    label: str = ""
    """Name of the tracker in messages."""

    where: str = ""
    """URL of the run, or the command that sends it."""

    stages: dict[str, SentStage] = field(default_factory=dict)
    errors: int = 0
    """Number of failed calls, over all commands."""

    error: str = ""
    """The last failure; empty once a later call succeeded."""

    def stage(self, name: str) -> SentStage:
        """Return what was sent of a stage."""
        return self.stages.setdefault(name, SentStage())


def state_file(run: Path, name: str) -> Path:
    """Return the path of a tracker's state. `name` is unique among the run's trackers."""
    return run / TRACKING / f"{name}.json"


def read_state(run: Path, name: str) -> TrackerState:
    """Return a tracker's state; an empty one if the file is missing or invalid."""
    values = as_mapping(read_json(state_file(run, name)))
    try:
        stages = {key: SentStage(**sent) for key, sent in values.pop("stages", {}).items()}
        return TrackerState(**values, stages=stages)
    except (AttributeError, TypeError):
        return TrackerState()


def write_state(run: Path, name: str, state: TrackerState) -> None:
    """Replace a tracker's state. Raises OSError."""
    write_text(state_file(run, name), json.dumps(asdict(state), indent=1) + "\n")


@dataclass(frozen=True)
class Delivery:
    """How much of a run arrived at a tracker."""

    sent: int
    total: int
    """Steps; the results of a stage without steps count as one."""

    unconfirmed: int
    """Steps that were handed to the tracker, which did not confirm them."""

    @property
    def complete(self) -> bool:
        """True if nothing is left."""
        return self.sent == self.total and not self.unconfirmed


def delivery_of(reader: RunReader, state: TrackerState) -> Delivery:
    """Compare what was sent with what the run folder holds."""
    total = sent = unconfirmed = 0
    for view in reader.stages():
        stage = state.stages.get(view.name, SentStage())
        if view.kind in ("sft", "grpo"):
            steps = len({line.get("step") for line in reader.metrics(view.name)})
        else:
            steps = int(view.state == "done" and (stage.steps > 0 or not stage.closed))
        total += steps
        sent += min(stage.arrived, steps)
        unconfirmed += max(0, min(stage.steps, steps) - stage.arrived)
    return Delivery(sent + unconfirmed, total, unconfirmed)
