"""Show a run folder in Weights & Biases: one group for the folder, one run for each stage.

A stage's run has the same id in every attempt and on every host, so that a resumed stage continues
its run. W&B's own step is the training step: the server keeps one line for each, and its sliders
through pictures and tables show it. All metrics have the step axis `step`, which has equal values.

Everything goes through wandb's service process, `wandb-core`. It hides a dead server: it buffers,
retries, and reports neither. Three things here make a failure an exception within about a minute:
its retries are bounded, `log` asks the server from time to time what has arrived, and `close`
returns only after the server has named the last step. After a failure the process is ended, so
that its buffer cannot arrive beside what the follower sends again.

Offline, wandb has no way to extend a run's file. Each session writes a new one from the first step.
`close` counts the steps in the file, and removes its predecessors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import psutil
import yaml

from rcot_rl.monitoring.judgement.alert import Alert
from rcot_rl.monitoring.run_files.run_status import read_status
from rcot_rl.monitoring.trackers.tracker import (
    TrackedArtifact,
    TrackedStage,
    Tracker,
    Value,
)
from rcot_rl.monitoring.trackers.wandb_artifacts import accepted_name, artifact_name, fill_artifact
from rcot_rl.monitoring.trackers.wandb_file import read_wandb_records
from rcot_rl.monitoring.trackers.wandb_values import WandbValues
from rcot_rl.recipe.tracking_section import WandbSection

if TYPE_CHECKING:
    import wandb

_logger = logging.getLogger(__name__)

STEP = "step"
SWEEP_VARIABLES = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")
"""Set by `wandb agent`. With them, `wandb.init` would give every stage the sweep's run id."""

INIT_S = 30.0
FINISH_S = 60.0
"""How long `close` waits for what is pending."""

CHECK_S = 60.0
"""`log` asks the server about once in this time for the last step that arrived."""

STALL_S = 180.0
"""A step that the server lacks after this time is a failure."""

ARRIVAL_S = 20.0
"""How long `close` waits for the server to index the last step."""

EXIT_CODES = {"done": 0, "failed": 1, "running": 255}
"""W&B shows 255 as `killed`: what it shows for a run that was interrupted."""

_BEST_IS_LEAST = re.compile(r"^(train|val)/loss$")
"""The losses of GRPO are not: they do not fall while the policy improves."""

_BEST_IS_GREATEST = re.compile(r"^reward/(.+/)?mean$|^heldout[/_].*(greedy|sampled)$|(^|/)JF(_|$)")

_HISTORY_QUERY = """
query RunHistoryKeys($project: String!, $entity: String!, $name: String!) {
    project(name: $project, entityName: $entity) { run(name: $name) { historyKeys } }
}
"""


class WandbTracker(Tracker):
    """Shows stages in Weights & Biases.

    Attributes:
        section: The recipe's section `wandb`; its mode is `online` or `offline`.
        folder: Where wandb keeps its files: RUN/tracking/wandb.
    """

    label: ClassVar[str] = "wandb"

    def __init__(self, section: WandbSection, folder: Path) -> None:
        self.section = section
        self.folder = Path(folder)
        self._cache = self.folder / "cache"
        self._run: wandb.Run | None = None
        self._stage: TrackedStage | None = None
        self._group = self._where = ""
        self._defined: set[str] = set()
        self._values = WandbValues()
        self._sent = 0
        self._logged = 0
        self._unchecked = (0.0, 0)  # a time and the last step that had been sent then
        self._next_check = 0.0
        self._best: dict[str, float] = {}
        self._results: dict[str, float] = {}

    @property
    def online(self) -> bool:
        """True if runs are sent to a server."""
        return self.section.mode == "online"

    def open(self, stage: TrackedStage) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = run_name(stage)
        self._group = group_name(stage.name, stage.run_id)
        for folder in self._sessions(name, "run"):  # a lost session; the server has what arrived
            shutil.rmtree(folder, ignore_errors=True)
        self._stage = stage
        self._run = self._init(
            id=name,
            group=self._group,
            name=f"{stage.name}-{stage.stage}"[:128],
            job_type=stage.kind,
            tags=tags_of(stage.tags),
            notes=stage.notes or None,
            config=dict(stage.config),
            live=_is_live(stage),
        )
        # tables keep their pictures here until they are sent
        os.environ["WANDB_DATA_DIR"] = str(Path(self._run.settings.sync_dir))
        self._logged = 0
        self._defined = set()
        self._best = {}
        self._run.define_metric(STEP, hidden=True)
        self._sent = max(0, self._run.starting_step - 1) if self.online else 0
        self._unchecked = (time.monotonic(), self._sent)
        self._next_check = time.monotonic() + CHECK_S
        if self.online:
            self._where = f"{self._run.project_url}/groups/{self._group}"
        _logger.info("wandb: %s run %s from step %d", self.section.mode, name, self._sent)
        return self._sent

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        run = self._opened()
        values = dict(values)
        moment = values.pop("time", None)
        for key, value in values.items():
            if key not in self._defined:
                self._define(run, key, value)
        line = {key: self._values.converted(value) for key, value in values.items()}
        line[STEP] = step
        if isinstance(moment, int | float):
            line["_timestamp"] = moment  # a step that is sent late was made then
        run.log(line, step=step, commit=True)
        self._keep_best(run, values)
        self._sent = max(self._sent, step)
        self._logged += 1
        if self._stage is not None and self._stage.kind not in ("sft", "grpo"):
            self._note_results(values)
        self._check_arrival(run)

    def summarize(self, values: Mapping[str, Value]) -> None:
        run = self._opened()
        run.summary.update({key: self._values.converted(value) for key, value in values.items()})
        self._note_results(values)

    def alert(self, alert: Alert) -> None:
        if not self.section.alerts:
            return
        self._opened().alert(
            title=alert.title[:63],
            text=f"{alert.stage}, step {alert.step}: {alert.text}",
            level="ERROR" if alert.level == "error" else "WARN",
            wait_duration=3600,  # the server drops one that is sent again within this time
        )

    def artifact(self, artifact: TrackedArtifact) -> None:
        if self.section.artifacts == "none":
            return
        import wandb

        run, stage = self._opened(), self._stage
        assert stage is not None
        item = wandb.Artifact(
            artifact_name(stage, artifact), artifact.kind, metadata=dict(artifact.metadata)
        )
        uploaded = fill_artifact(item, artifact.path, copies=self.section.artifacts == "copies")
        # `use_artifact` refuses to work offline, though what it writes then can be sent later
        used = artifact.role == "used"
        logged = run._log_artifact(item, is_user_created=used, use_after_commit=used)
        if self.online:
            logged.wait(timeout=round(FINISH_S + uploaded / 1e6))

    def close(self, state: Literal["running", "done", "failed"]) -> None:
        run, self._run = self._opened(), None
        try:
            run.finish(exit_code=EXIT_CODES[state])
            if self.online:
                self._await_arrival(run)
                self._report_to_sweep()
            else:
                _complete_file(Path(run.settings.sync_file), self._logged)
        except BaseException:
            self._end_service()
            raise
        # the server has what was sent; offline, this session's file replaces earlier ones
        for folder in self._sessions(run.id, "run" if self.online else "offline-run"):
            if self.online or folder != Path(run.settings.sync_dir):
                shutil.rmtree(folder, ignore_errors=True)
        # a run folder has no links, so that a copy of it is whole; these lead into the cache
        for link in self.folder.glob("wandb/*/logs/*"):
            if link.is_symlink():
                link.unlink(missing_ok=True)
        shutil.rmtree(self._cache, ignore_errors=True)

    def where(self) -> str:
        if self.online:
            return self._where
        return f"rcot wandb sync {self.folder.parent.parent}"

    def _opened(self) -> wandb.Run:
        if self._run is None:
            raise RuntimeError("no stage is open")
        return self._run

    def _init(self, *, live: bool, sweep: str | None = None, **properties: Any) -> wandb.Run:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CACHE_DIR", str(self._cache))
        if not _services():  # of `wandb agent`, say: a process that `_end_service` must not end
            os.environ.pop("WANDB_SERVICE", None)
        with _hidden(SWEEP_VARIABLES):
            import wandb

            settings = wandb.Settings(
                mode=self.section.mode,
                root_dir=str(self.folder),
                use_dot_wandb=False,
                console="off",
                silent=True,
                sweep_id=sweep,
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_save_requirements=False,
                x_disable_stats=not live,
                x_disable_machine_info=not live,
                symlink=False,
                stop_fn=lambda: None,  # the button "stop" of the page must not interrupt this
                init_timeout=INIT_S,
                finish_timeout=FINISH_S,
                finish_timeout_raises=True,
                x_file_stream_retry_max=5,
                x_file_stream_retry_wait_max_seconds=20,
                x_file_stream_timeout_seconds=20,
                x_graphql_retry_max=4,
                x_graphql_retry_wait_max_seconds=10,
                x_graphql_timeout_seconds=20,
                x_file_transfer_retry_max=5,
                x_file_transfer_retry_wait_max_seconds=20,
            )
            try:
                return wandb.init(
                    project=self.section.project,
                    entity=self.section.entity,
                    resume="allow" if self.online else None,
                    allow_val_change=True,
                    reinit="create_new",
                    settings=settings,
                    **properties,
                )
            except BaseException:
                self._end_service()
                raise

    def _define(self, run: wandb.Run, key: str, value: Value) -> None:
        self._defined.add(key)
        goal = goal_of(key) if isinstance(value, int | float) else None
        previous = run.summary.get(key) if goal and run.resumed else None
        if isinstance(previous, Mapping) and isinstance(previous.get(goal), int | float):
            self._best[key] = previous[goal]
        run.define_metric(key, step_metric=STEP, summary=f"{goal},last" if goal else None)

    def _keep_best(self, run: wandb.Run, values: Mapping[str, Value]) -> None:
        """Correct the summary of a resumed run: wandb-core knows the best of its session only."""
        corrections = {}
        for key, best in self._best.items():
            value, goal = values.get(key), goal_of(key)
            if goal is None or not isinstance(value, int | float):
                continue
            if (value > best) if goal == "max" else (value < best):
                self._best[key] = value
            else:
                corrections[key] = {goal: best, "last": value}
        if corrections:
            run.summary.update(corrections)

    def _check_arrival(self, run: wandb.Run) -> None:
        """Raise if the server lacks a step that was logged STALL_S ago, or does not answer."""
        now = time.monotonic()
        if not self.online or now < self._next_check:
            return
        since, step = self._unchecked
        arrived = self._last_step(run)
        if arrived >= step:
            self._unchecked = (now, self._sent)
        elif now - since > STALL_S:
            raise WandbStalled(f"the server has step {arrived}; step {step} was sent before")
        self._next_check = now + CHECK_S

    def _await_arrival(self, run: wandb.Run) -> None:
        """Return once the server names the last step, within ARRIVAL_S."""
        deadline = time.monotonic() + ARRIVAL_S
        while (arrived := self._last_step(run)) < self._sent:
            if time.monotonic() > deadline:
                raise WandbStalled(f"the server has step {arrived} of {self._sent}")
            time.sleep(1.0)

    def _last_step(self, run: wandb.Run) -> int:
        from wandb.apis.public.service_api import ServiceApi

        # wandb.Api would load the whole run with its config for this
        answer: dict[str, Any] = ServiceApi(run.settings).execute_graphql(
            _HISTORY_QUERY,
            {"entity": run.entity, "project": run.project, "name": run.id},
            timeout=ARRIVAL_S,
        )
        history = ((answer.get("project") or {}).get("run") or {}).get("historyKeys") or {}
        return max(0, int(history.get("lastStep", 0)))  # -1 for a run without steps

    def _note_results(self, values: Mapping[str, Value]) -> None:
        """Keep scalar results for the sweep, under `<stage>/<key>` or a key that starts so."""
        assert self._stage is not None
        prefix = f"{self._stage.stage}/"
        for key, value in values.items():
            if isinstance(value, int | float):
                self._results[prefix + key.removeprefix(prefix)] = value

    def _report_to_sweep(self) -> None:
        """Give the results of all stages so far to the run that `wandb agent` waits for."""
        run_id, sweep_id = (os.environ.get(name) for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID"))
        if not run_id or not sweep_id or not self._results:
            return
        stage = self._stage
        assert stage is not None
        run = self._init(
            id=run_id,
            group=self._group,
            name=f"{stage.name}-sweep"[:128],
            job_type="sweep",
            config={"run": str(stage.run), "run_id": stage.run_id, **_sweep_parameters()},
            sweep=sweep_id,
            live=False,
        )
        run.log(self._results)
        run.finish(exit_code=0)
        for folder in self._sessions(run_id, "run"):
            shutil.rmtree(folder, ignore_errors=True)

    def _sessions(self, name: str, kind: Literal["run", "offline-run"]) -> list[Path]:
        """Return wandb's folders of a run: `run-…` if online, `offline-run-…` if offline."""
        return [file.parent for file in self.folder.glob(f"wandb/{kind}-*/run-{name}.wandb")]

    def _end_service(self) -> None:
        """End wandb's process and forget its session, so that `open` starts afresh."""
        import wandb

        self._run = None
        for child in _services():
            with contextlib.suppress(psutil.Error):
                child.kill()
                child.wait(10)
        with contextlib.suppress(Exception, SystemExit):  # it has lost its process
            wandb.teardown(exit_code=1)


class WandbStalled(RuntimeError):
    """The server or the offline file lacks steps that were logged."""


def _complete_file(file: Path, steps: int) -> None:
    """End wandb-core, which completes its file only then, and count the steps in the file.

    Raises:
        WandbStalled: Steps are missing: wandb-core does not report that a disk is full.
    """
    import wandb

    with contextlib.suppress(SystemExit):  # of wandb-core's status; the file tells more
        wandb.teardown()
    written = sum(record.HasField("history") for record in read_wandb_records(file))
    if written != steps:
        raise WandbStalled(f"{file} has {written} of {steps} steps; is the disk full?")


def group_name(name: str, run_id: str) -> str:
    """Return the W&B group of a run folder: its recipe's name and its id."""
    return accepted_name(f"{name}-{run_id}")


def run_name(stage: TrackedStage) -> str:
    """Return the W&B run id of a stage: equal in every attempt and on any host."""
    return accepted_name(f"{stage.run_id}-{stage.stage}")


def tags_of(tags: Sequence[str]) -> list[str]:
    """Return distinct tags of at most 64 characters, as W&B demands."""
    return list(dict.fromkeys(tag.strip()[:64] for tag in tags if tag.strip()))


def goal_of(key: str) -> Literal["max", "min"] | None:
    """Return which value of a metric is its best; None if neither end is."""
    if _BEST_IS_LEAST.search(key):
        return "min"
    return "max" if _BEST_IS_GREATEST.search(key) else None


def _is_live(stage: TrackedStage) -> bool:
    """Return True if the stage runs now on this host, whose load is then worth recording."""
    status = read_status(stage.run)
    return (
        status is not None
        and status.is_running
        and status.stage == stage.stage
        and status.host == socket.gethostname()
    )


def _services() -> list[psutil.Process]:
    """Return the wandb-core processes of this process."""
    services = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                services.append(child)
    return services


@contextlib.contextmanager
def _hidden(names: Sequence[str]) -> Iterator[None]:
    """Run the body without some environment variables."""
    values = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)


def _sweep_parameters() -> dict[str, Any]:
    """Return the parameters that `wandb agent` chose, from the file that it wrote for wandb."""
    file = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not file:
        return {}
    values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return {
        key: value["value"]
        for key, value in values.items()
        if isinstance(value, Mapping) and "value" in value
    }
