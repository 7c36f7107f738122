"""What the W&B tracker writes offline and sends online, read back from the real wandb-core."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import wandb
from fake_wandb_server import FakeWandb
from offline_run import OfflineRun, read_run

from rcot_rl.monitoring.judgement.alert import Alert
from rcot_rl.monitoring.trackers import wandb_artifacts, wandb_tracker
from rcot_rl.monitoring.trackers.tracker import (
    DataTable,
    Distribution,
    Picture,
    PictureBox,
    TrackedArtifact,
    TrackedStage,
    Value,
)
from rcot_rl.monitoring.trackers.wandb_tracker import WandbTracker, goal_of, tags_of
from rcot_rl.recipe.tracking_section import WandbSection

RUN_ID = "abc123-grpo-ktg"
LARGE = wandb_artifacts.SMALL_BYTES + 1


def stage_of(root: Path, name: str = "grpo-ktg") -> TrackedStage:
    config = {"train": {"grpo-ktg": {"learning_rate": 8e-05}}, "git_commit": "f00"}
    tags = ["laptop", "x" * 80, "laptop"]
    return TrackedStage(root, "abc123", "laptop", name, "grpo", config, tags, "why this run")


def picture(groups: tuple[str, ...] = ("ground truth", "predicted")) -> Picture:
    boxes = [PictureBox((2, 3, 30, 20), "object 1"), PictureBox((9, 9, 9, 9), "point 1")]
    mask = np.zeros((40, 60), dtype=bool)
    mask[3:20, 2:30] = True
    image = np.full((40, 60, 3), 90, dtype=np.uint8)
    return Picture(image, dict.fromkeys(groups, boxes), {"segmenter": mask}, "step 1")


def values_at(step: int) -> dict[str, Value]:
    rows = [["a", step, picture(), True], ["b", 0.5, picture(("ground truth",)), None]]
    return {
        "time": 1e9 + step,
        "reward/mean": float(10 - step),
        "train/loss": float(step),
        "group/zero_variance_fraction": 0.25,
        "distribution/reward": Distribution([0, 1, 2], [step, 7]),
        "rollouts": DataTable(["prompt", "reward", "picture", "right"], rows),
    }


def log(tracker: WandbTracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log(step, {"reward/mean": float(10 - step), "train/loss": float(step)})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights.bin").write_bytes(bytes(LARGE))
    return folder


@pytest.fixture
def offline(tmp_path: Path, wandb_home: Path) -> WandbTracker:
    return WandbTracker(WandbSection(mode="offline"), tmp_path / "run" / "tracking" / "wandb")


@pytest.fixture
def online(tmp_path: Path, wandb_server: FakeWandb) -> WandbTracker:
    return WandbTracker(WandbSection(mode="online"), tmp_path / "run" / "tracking" / "wandb")


def written(tracker: WandbTracker) -> OfflineRun:
    """Return the only file of a tracker's folder."""
    (file,) = tracker.folder.rglob("*.wandb")
    return read_run(file)


def test_an_offline_stage_is_one_file_with_every_record(
    offline: WandbTracker, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "f" * 40
    monkeypatch.setenv("WANDB_API_KEY", secret)
    assert offline.open(stage_of(tmp_path / "run")) == 0
    for step in (1, 2, 3):
        offline.log(step, values_at(step))
    offline.summarize({"JF_mevis_valid_u": 0.5, "scores": DataTable(["J"], [[0.4]])})
    offline.alert(Alert("hang", "error", "grpo-ktg", 3, "No step", "None for 10 minutes."))
    offline.artifact(TrackedArtifact("shards-ktg", "shards", model, "used", {"sha256": "5a"}))
    offline.artifact(TrackedArtifact("model-ktg", "model", model, "made"))
    offline.close("done")

    got = written(offline)
    run = got.run
    assert (run.run_id, run.run_group, run.job_type) == (RUN_ID, "laptop-abc123", "grpo")
    assert (run.display_name, run.notes) == ("laptop-grpo-ktg", "why this run")
    assert list(run.tags) == ["laptop", "x" * 64]
    assert got.config["train"]["grpo-ktg"]["learning_rate"] == 8e-05
    assert got.steps == [1, 2, 3]
    for step, line in enumerate(got.history, 1):
        assert line["step"] == step and line["_timestamp"] == 1e9 + step
        assert line["reward/mean"] == 10 - step
        assert line["distribution/reward"]["values"] == [step, 7]
        assert line["rollouts"]["nrows"] == 2
    assert got.summary["reward/mean"] == {"max": 9, "last": 7}
    assert got.summary["train/loss"] == {"min": 1, "last": 3}
    assert got.summary["JF_mevis_valid_u"] == 0.5
    assert got.summary["scores"]["_type"] == "table-file"
    assert {m.step_metric for name, m in got.metrics.items() if name != "step"} == {"step"}
    assert got.metrics.keys() == (values_at(1).keys() - {"time"}) | {"step"}
    (alert,) = got.alerts
    assert (alert.title, alert.level) == ("No step", "ERROR")
    lineage = {a.name: a for a in got.artifacts}
    assert lineage["shards-ktg"].use_after_commit and not lineage["abc123-model-ktg"].user_created
    assert json.loads(lineage["shards-ktg"].metadata) == {"sha256": "5a"}
    tables = [a for a in got.artifacts if a.name == f"run-{RUN_ID}-rollouts"]
    assert len({a.digest for a in tables}) == 3  # one for each step
    paths = [entry.path for entry in tables[0].manifest.contents]
    assert sum(path.endswith(".jpg") for path in paths) == 1  # both cells show the same frame
    assert sum(path.endswith(".mask.png") for path in paths) == 1
    assert got.exit_code == 0
    assert not any(path.is_symlink() for path in offline.folder.rglob("*")), "a copy is whole"
    files = [file for file in offline.folder.rglob("*") if file.is_file()]
    assert not any(secret.encode() in file.read_bytes() for file in files)
    assert offline.where() == f"rcot wandb sync {tmp_path / 'run'}"


def test_boxes_points_and_masks_are_overlays_of_groups(
    offline: WandbTracker, tmp_path: Path
) -> None:
    offline.open(stage_of(tmp_path))
    offline.log(1, {"frame": picture()})
    offline.close("done")
    ((line),) = written(offline).history
    assert line["frame"]["boxes"].keys() == {"ground truth", "predicted"}
    assert line["frame"]["masks"].keys() == {"segmenter"}
    (file,) = offline.folder.rglob(Path(line["frame"]["boxes"]["predicted"]["path"]).name)
    box, point = json.loads(file.read_text())["box_data"]
    assert box["position"] == {"minX": 2, "minY": 3, "maxX": 30, "maxY": 20}
    centre = (point["position"]["minX"] + point["position"]["maxX"]) / 2
    assert centre == 9 and point["position"]["maxX"] > point["position"]["minX"]
    assert [box["box_caption"], point["box_caption"]] == ["object 1", "point 1"]


def test_an_offline_stage_that_continues_replaces_its_file(
    offline: WandbTracker, tmp_path: Path
) -> None:
    offline.open(stage_of(tmp_path))
    log(offline, 1, 3)
    offline.close("running")
    assert written(offline).exit_code == 255
    offline.open(stage_of(tmp_path, "sft"))
    log(offline, 1, 2)
    offline.close("done")
    # a follower that is killed leaves a file that nobody completes
    offline.open(stage_of(tmp_path))
    log(offline, 1, 4)
    kill_service()
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()  # as a new process begins
    again = WandbTracker(offline.section, offline.folder)
    assert again.open(stage_of(tmp_path)) == 0
    log(again, 1, 6)
    again.close("done")
    runs = {run.run.run_id: run for run in map(read_run, again.folder.rglob("*.wandb"))}
    assert len(list(again.folder.rglob("*.wandb"))) == 2
    assert runs[RUN_ID].steps == [1, 2, 3, 4, 5, 6]
    assert runs["abc123-sft"].steps == [1, 2]


def test_an_offline_file_that_lacks_steps_is_an_exception_and_is_written_again(
    offline: WandbTracker, tmp_path: Path
) -> None:
    """wandb-core is limited to small files, which it meets as it meets a full disk: silently."""
    offline.open(stage_of(tmp_path))
    (service,) = services()
    _, hard = service.rlimit(psutil.RLIMIT_FSIZE)
    service.rlimit(psutil.RLIMIT_FSIZE, (1 << 17, hard))
    for step in range(1, 3000):
        offline.log(step, {f"reward/{k}/mean": 0.1 * k for k in range(20)})
    with pytest.raises(wandb_tracker.WandbStalled, match=r"of 2999 steps; is the disk full\?"):
        offline.close("done")
    assert offline.open(stage_of(tmp_path)) == 0
    log(offline, 1, 5)
    offline.close("done")
    assert written(offline).steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("artifacts", "uploaded", "referenced"),
    [
        ("references", {"config.json"}, {"weights.bin"}),
        ("copies", {"config.json", "weights.bin"}, set()),
    ],
)
def test_large_files_are_references_unless_copies_are_asked_for(
    tmp_path: Path, wandb_home: Path, model: Path, artifacts: str, uploaded: set, referenced: set
) -> None:
    section = WandbSection(artifacts=artifacts)
    tracker = WandbTracker(section, tmp_path / "run" / "tracking" / "wandb")
    tracker.open(stage_of(tmp_path))
    tracker.artifact(TrackedArtifact("model-ktg", "model", model, "made"))
    tracker.close("done")
    (artifact,) = written(tracker).artifacts
    entries = {entry.path: entry for entry in artifact.manifest.contents}
    assert {path for path, entry in entries.items() if not entry.ref} == uploaded
    assert {path for path, entry in entries.items() if entry.ref} == referenced
    for path in referenced:
        assert entries[path].ref == (model / path).as_uri() and entries[path].size == LARGE
    for path in uploaded:  # from where it lies: no second copy on this disk
        assert Path(entries[path].local_path) == model / path


def test_a_folder_of_many_files_is_one_reference_that_changes_with_them(
    offline: WandbTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_artifacts, "MAX_FILES", 5)
    masks = tmp_path / "predictions"
    (masks / "clip").mkdir(parents=True)
    (masks / "settings.json").write_text("{}")
    for k in range(8):
        (masks / "clip" / f"{k}.png").write_bytes(bytes(k))
    offline.open(stage_of(tmp_path))
    artifact = TrackedArtifact("predictions", "predictions", masks, "made")
    offline.artifact(artifact)
    (masks / "clip" / "3.png").write_bytes(b"new")  # of the same size
    offline.artifact(artifact)
    offline.close("done")
    first, second = written(offline).artifacts
    assert {e.path: bool(e.ref) for e in first.manifest.contents} == {
        "predictions": True,
        "settings.json": False,
    }
    assert first.digest != second.digest


def test_artifacts_and_alerts_can_be_switched_off(
    tmp_path: Path, wandb_home: Path, model: Path
) -> None:
    tracker = WandbTracker(WandbSection(artifacts="none", alerts=False), tmp_path / "t" / "wandb")
    tracker.open(stage_of(tmp_path))
    log(tracker, 1, 1)
    tracker.artifact(TrackedArtifact("model", "model", model, "made"))
    tracker.alert(Alert("disk", "warning", "grpo-ktg", 1, "Disk", "Full soon."))
    tracker.close("failed")
    got = written(tracker)
    assert (got.artifacts, got.alerts, got.exit_code) == ([], [], 1)


def test_an_online_stage_that_continues_is_one_run_with_each_step_once(
    online: WandbTracker, wandb_server: FakeWandb, tmp_path: Path, model: Path
) -> None:
    stage = stage_of(tmp_path)
    assert online.open(stage) == 0
    assert online.where() == f"{wandb_server.url}/someone/rcot-rl/groups/laptop-abc123"
    log(online, 1, 3)
    online.artifact(TrackedArtifact("shards-ktg", "shards", model, "used"))
    online.close("running")
    run = wandb_server.runs[RUN_ID]
    assert run.exit_code == 255
    assert online.open(stage) == 3
    log(online, 4, 6)
    online.summarize({"JF_mevis_valid_u": 0.5})
    online.alert(Alert("hang", "warning", "grpo-ktg", 3, "No step", "None for 10 minutes."))
    online.close("done")
    assert list(run.steps()) == [1, 2, 3, 4, 5, 6]
    assert len(run.arrived) == 6
    # best over both sessions, though wandb-core knows only the second one
    assert run.summary["reward/mean"] == {"max": 9, "last": 4}
    assert run.summary["train/loss"] == {"min": 1, "last": 6}
    assert run.summary["JF_mevis_valid_u"] == 0.5
    assert (run.group, run.job_type, run.display_name) == (
        "laptop-abc123",
        "grpo",
        "laptop-grpo-ktg",
    )
    assert run.config["train"]["value"]["grpo-ktg"]["learning_rate"] == 8e-05
    assert [alert["severity"] for alert in run.alerts] == ["WARN"]
    (used,) = run.used
    assert wandb_server.artifacts[used].manifest["contents"].keys() == {
        "config.json",
        "weights.bin",
    }
    assert not list(online.folder.rglob("*.wandb"))  # the server has it
    assert wandb_server.unknown == []


def test_a_stage_without_steps_has_its_summary_and_artifacts(
    online: WandbTracker, wandb_server: FakeWandb, tmp_path: Path, model: Path
) -> None:
    online.open(TrackedStage(tmp_path, "abc123", "laptop", "report", "report"))
    online.summarize({"state": "done"})
    online.artifact(TrackedArtifact("report", "report", model / "config.json", "made"))
    online.close("done")
    run = wandb_server.runs["abc123-report"]
    assert (run.history, run.summary["state"], run.exit_code) == ([], "done", 0)
    (artifact,) = wandb_server.artifacts.values()
    assert (artifact.name, artifact.committed) == ("abc123-report", True)


def fails_to_send(tracker: WandbTracker, steps: range, pause_s: float) -> None:
    """Log steps until that raises; closing the tracker must raise too."""
    with pytest.raises(Exception, match=r"."):
        for step in steps:
            log(tracker, step, step)
            time.sleep(pause_s)
    with pytest.raises(Exception, match=r"."):
        tracker.close("running")


def test_steps_that_were_lost_with_the_process_are_asked_for_again(
    online: WandbTracker, wandb_server: FakeWandb, tmp_path: Path
) -> None:
    online.open(stage_of(tmp_path))
    log(online, 1, 3)
    kill_service()
    fails_to_send(online, range(4, 500), 0.05)
    last = online.open(stage_of(tmp_path))
    assert last == len(wandb_server.runs[RUN_ID].history)
    log(online, last + 1, 6)
    online.close("done")
    assert list(wandb_server.runs[RUN_ID].steps()) == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"INIT_S": 3.0, "FINISH_S": 3.0, "ARRIVAL_S": 2.0, "CHECK_S": 0.5}.items():
        monkeypatch.setattr(wandb_tracker, name, seconds)


def refuse(server: FakeWandb) -> None:
    server.stop()


def hang(server: FakeWandb) -> None:
    server.fault = "hang"


def fail(server: FakeWandb) -> None:
    server.fault = "error"


@pytest.mark.parametrize("break_server", [refuse, hang, pytest.param(fail, marks=pytest.mark.slow)])
def test_a_dead_server_is_an_exception_within_seconds_and_loses_nothing(
    online: WandbTracker,
    wandb_server: FakeWandb,
    tmp_path: Path,
    impatient: None,
    break_server: Callable[[FakeWandb], None],
) -> None:
    online.open(stage_of(tmp_path))
    log(online, 1, 3)
    break_server(wandb_server)
    began = time.monotonic()
    fails_to_send(online, range(4, 1000), 0.1)
    with pytest.raises(Exception, match=r"."):
        online.open(stage_of(tmp_path))
    assert time.monotonic() - began < 30
    assert services() == []

    wandb_server.fault = None
    if break_server is refuse:
        wandb_server.start()
    last = online.open(stage_of(tmp_path))
    log(online, last + 1, 8)
    online.close("done")
    run = wandb_server.runs[RUN_ID]
    assert list(run.steps()) == list(range(1, max(last, 8) + 1))
    assert {step: line["reward/mean"] for step, line in run.steps().items()} == {
        step: 10 - step for step in run.steps()
    }


def test_steps_that_never_arrive_are_noticed_while_the_server_answers(
    online: WandbTracker,
    wandb_server: FakeWandb,
    tmp_path: Path,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wandb_tracker, "STALL_S", 2.0)
    wandb_server.fault, wandb_server.only = "error", "file_stream"
    online.open(stage_of(tmp_path))
    with pytest.raises(wandb_tracker.WandbStalled):
        for step in range(1, 1000):
            log(online, step, step)
            time.sleep(0.1)
    with pytest.raises(Exception, match=r"."):
        online.close("running")
    wandb_server.fault = None
    assert online.open(stage_of(tmp_path)) == 0
    log(online, 1, 2)
    online.close("done")
    assert list(wandb_server.runs[RUN_ID].steps()) == [1, 2]


_CHILD = """
import sys, time
from pathlib import Path
from rcot_rl.monitoring.trackers.tracker import TrackedStage
from rcot_rl.monitoring.trackers.wandb_tracker import WandbTracker, _services
from rcot_rl.recipe.tracking_section import WandbSection
root = Path(sys.argv[1])
tracker = WandbTracker(WandbSection(mode="online"), root / "tracking" / "wandb")
tracker.open(TrackedStage(root, "abc123", "laptop", "grpo-ktg", "grpo"))
tracker.log(1, {"reward/mean": 1.0})
print(_services()[0].pid, flush=True)
time.sleep(60)
"""


def test_wandb_core_ends_with_a_killed_follower(wandb_server: FakeWandb, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    service = psutil.Process(int(child.stdout.readline()))
    wandb_server.fault = "hang"
    child.kill()
    child.wait()
    service.wait(20)


def test_a_sweep_gets_the_results_of_all_stages_in_its_own_run(
    online: WandbTracker, wandb_server: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = tmp_path / "config-s1.yaml"
    parameters.write_text("wandb_version: 1\nreward:\n  value: ktg-soft\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "s1")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))
    for name, score in (("grpo-aks", 0.4), ("grpo-ktg", 0.6)):
        online.open(stage_of(tmp_path, name))
        log(online, 1, 2)
        online.summarize({"JF_mevis_valid_u": score, "state": "done"})
        online.close("done")
    online.open(TrackedStage(tmp_path, "abc123", "laptop", "eval", "eval"))
    online.log(1, {"eval/mevis_valid_u/grpo-ktg/JF": 0.7})
    online.close("done")
    stages = {"abc123-grpo-aks", RUN_ID, "abc123-eval"}
    assert wandb_server.runs.keys() == stages | {"s1"}
    run = wandb_server.runs["s1"]
    assert run.sweep == "sweep1" and run.config["reward"]["value"] == "ktg-soft"
    assert run.summary["grpo-ktg/JF_mevis_valid_u"] == 0.6
    assert run.summary["grpo-aks/JF_mevis_valid_u"] == 0.4
    assert run.summary["eval/mevis_valid_u/grpo-ktg/JF"] == 0.7
    assert all(wandb_server.runs[name].sweep is None for name in stages)
    assert os.environ["WANDB_SWEEP_ID"] == "sweep1"


def test_ids_groups_and_tags_have_only_characters_that_wandb_accepts(
    offline: WandbTracker, tmp_path: Path
) -> None:
    stage = TrackedStage(tmp_path, "abc123", "my recipe: a/b", "grpo ktg#1?", "grpo")
    offline.open(stage)
    log(offline, 1, 1)
    offline.close("done")
    run = written(offline).run
    assert (run.run_id, run.run_group) == ("abc123-grpo-ktg-1-", "my-recipe--a-b-abc123")
    assert tags_of(["", " a ", "a", "b" * 65]) == ["a", "b" * 64]


@pytest.mark.parametrize(
    ("key", "goal"),
    [
        ("reward/mean", "max"),
        ("reward/format/mean", "max"),
        ("reward/std", None),
        ("reward/seconds_max", None),
        ("heldout_ktg_sampled", "max"),
        ("heldout_ktg_sampled_change", None),
        ("heldout/ktg/sft/greedy", "max"),
        ("eval/mevis_valid_u/sft/JF", "max"),
        ("JF_mevis_valid_u", "max"),
        ("train/loss", "min"),
        ("actor/pg_loss", None),
        ("timing_s/step", None),
    ],
)
def test_only_metrics_with_a_direction_have_a_best_value(key: str, goal: str | None) -> None:
    assert goal_of(key) == goal


def services() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == "wandb-core"]


def kill_service() -> None:
    for service in services():
        service.kill()
        service.wait(10)
    time.sleep(0.3)
