"""What `rcot watch` knows about a run: read-only, and only what changed since the last look."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rcot_rl.errors import InputError
from rcot_rl.monitoring.judgement.alert import Alert
from rcot_rl.monitoring.judgement.alert_rules import AlertWatch
from rcot_rl.monitoring.judgement.landmarks import RewardFacts, component_keys, reward_facts
from rcot_rl.monitoring.judgement.run_verdict import RunVerdict, judge_run
from rcot_rl.monitoring.run_files.run_reader import RunReader, StageView, as_mapping
from rcot_rl.monitoring.run_files.run_status import RunStatus
from rcot_rl.monitoring.run_files.step_tail import StepTail
from rcot_rl.prediction_layout import heldout_rewards_file
from rcot_rl.stats.json_values import is_number

_Value = TypeVar("_Value")

KEPT = (
    "reward/mean",
    "train/loss",
    "group/zero_variance_fraction",
    "response_length/mean",
    "actor/kl_loss",
    "timing_s/step",
)
"""Metrics that are kept of every step, beside the components of the reward."""


_ALERTED = (
    "reward/",
    "reason/",
    "group/",
    "actor/kl_loss",
    "response_length/",
    "disk/",
    "checkpoint/",
)
"""Metrics that alerts depend on."""


class MetricsTail:
    """The steps of one `metrics.jsonl`, of which only new lines are read.

    Attributes:
        steps: Numbers of the steps, in order.
        times: End of each step in seconds since the epoch; None if it is unknown.
        curves: Kept metric -> its value at each step; None where a step lacks it.
        last: All values of the last step.
    """

    def __init__(self, path: Path) -> None:
        self._tail = StepTail(path)
        self.steps: list[int] = []
        self.times: list[float | None] = []
        self.curves: dict[str, list[float | None]] = {}
        self.last: dict[str, Any] = {}

    def poll(self) -> list[dict[str, Any]]:
        """Read and return the new steps.

        A step that a resumed attempt repeats replaces itself and all later ones. A file that was
        replaced is read again; its steps that are known are not new.
        """
        known: set[tuple[int, float | None]] = set()
        new = []
        with contextlib.suppress(OSError):
            for number, line in enumerate(self._tail.new_lines()):
                if number == 0 and self.steps and line["step"] <= self.steps[-1]:
                    known = set(zip(self.steps, self.times, strict=True))
                self._add(line)
                if (line["step"], _number(line.get("time"))) not in known:
                    new.append(line)
        return new

    def _add(self, line: dict[str, Any]) -> None:
        kept = bisect_left(self.steps, line["step"])
        if kept < len(self.steps):
            del self.steps[kept:]
            for column in (self.times, *self.curves.values()):
                del column[kept:]
        self.steps.append(line["step"])
        self.times.append(_number(line.get("time")))
        for key in line:
            if key in KEPT or (key.startswith("reward/") and key.endswith("/mean")):
                self.curves.setdefault(key, [None] * kept)
        for key, curve in self.curves.items():
            curve.append(_number(line.get(key)))
        self.last = line

    @property
    def components(self) -> list[str]:
        """Return the components of the reward at the last step."""
        return list(component_keys(self.last))


def _number(value: Any) -> float | None:
    """Return a finite number, and None for anything else."""
    return float(value) if is_number(value) else None


class WatchedRun:
    """A run folder that is looked at again and again. Opens files for reading only.

    Attributes:
        stages: All stages, as of the last `poll`.
        tails: Training stage -> its steps.
        rewards: Training stage -> what is known about its reward.
        verdict: The verdict on a finished run; None before.
        alerts: All alerts so far, in the order of the stages and steps as they were read.
    """

    def __init__(self, root: Path) -> None:
        """Open a run folder. Raises InputError."""
        try:
            if not root.is_dir():
                raise InputError("no such run folder", file=root)
            names = {path.name for path in root.iterdir()}
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", file=root) from error
        if "recipe.yaml" not in names:
            raise InputError("is not a run's folder: it has no recipe.yaml", file=root)
        self.reader = RunReader(root)
        self.status: RunStatus | None = None
        self.stages: list[StageView] = []
        self.tails: dict[str, MetricsTail] = {}
        self.heldout: dict[str, Any] = {}
        self.scores: dict[str, dict[str, Any]] = {}
        self.verdict: RunVerdict | None = None
        self.alerts: list[Alert] = []
        self._watches: dict[str, AlertWatch] = {}
        self.rewards: dict[str, RewardFacts] = {}
        self._seen: dict[str, object] = {}

    def poll(self) -> None:
        """Read what is new."""
        self.status = self.reader.status
        self.stages = self.reader.stages()
        for stage in self.stages:
            if stage.kind in ("sft", "grpo"):
                self._poll_stage(stage)
        rewards = heldout_rewards_file(self.reader.root)
        self.heldout = self._changed([rewards], "heldout", self.reader.heldout, self.heldout)
        try:
            files = sorted((self.reader.root / "eval").glob("*.json"))
        except OSError:
            files = []
        self.scores = self._changed(files, "scores", self._scores, self.scores)
        self.verdict = self._judge()

    def _poll_stage(self, stage: StageView) -> None:
        if stage.name not in self.tails:
            self.tails[stage.name] = MetricsTail(stage.folder / "metrics.jsonl")
            self._watches[stage.name] = AlertWatch(self.reader, stage.name)
            self.rewards[stage.name] = reward_facts(self.reader, stage.name)
        watch = self._watches[stage.name]
        for line in self.tails[stage.name].poll():
            # the rules keep every step, and most of its values are timings
            kept = {k: v for k, v in line.items() if k.startswith(_ALERTED) or k == "step"}
            self.alerts += watch.update(kept)
        self.alerts += watch.new_failures()

    @property
    def current(self) -> StageView | None:
        """The stage that runs, or the last one that has started."""
        running = [s for s in self.stages if s.state == "running"]
        started = running or [s for s in self.stages if s.state != "pending"]
        return started[-1] if started else None

    @property
    def shown_stage(self) -> str | None:
        """The training stage whose curves are shown: the current one, or the last with steps."""
        names = [s.name for s in self.stages if s.name in self.tails and self.tails[s.name].steps]
        current = self.current
        if current is not None and current.name in names:
            return current.name
        return names[-1] if names else None

    @property
    def is_finished(self) -> bool:
        """True if nothing more will happen unless someone starts the run again.

        A command that was killed did not say so. It may also run on a host whose clock differs, so
        that it is not finished.
        """
        if self.status is not None:
            return self.status.state != "running"
        return bool(self.stages) and all(stage.state == "done" for stage in self.stages)

    def _judge(self) -> RunVerdict | None:
        """Return what the rules of docs/alerts.md say about a finished run that trained."""
        if not self.is_finished:
            return None
        verdict = judge_run(self.reader)
        return None if verdict.level == "unknown" else verdict

    def _scores(self) -> dict[str, dict[str, Any]]:
        """Return benchmark -> checkpoint -> J&F; without the scores of single expressions."""
        return {
            name: {
                checkpoint: as_mapping(row).get("J&F")
                for checkpoint, row in as_mapping(scores.get("checkpoints")).items()
            }
            for name, scores in self.reader.scores().items()
        }

    def _changed(
        self, files: list[Path], name: str, read: Callable[[], _Value], before: _Value
    ) -> _Value:
        """Return `read()` if one of the files is new or changed, and `before` otherwise."""
        state: list[object] = []
        for file in files:
            try:
                facts = file.stat()
            except OSError:
                continue
            state.append((file, facts.st_ino, facts.st_size, facts.st_mtime_ns))
        if self._seen.get(name) == state:
            return before
        self._seen[name] = state
        return read()
