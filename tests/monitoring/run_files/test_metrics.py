"""StepCopier of verl's log: half-written lines, resumed attempts, other lines."""

from __future__ import annotations

import json
import time
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rcot_rl.monitoring.run_files.metrics import (
    StepCopier,
    keep_steps_before,
    read_metrics,
    recover_steps,
    restore_step,
)


def entry(step: int, **data: float) -> str:
    """Return a line of verl's file logger."""
    return json.dumps({"step": step, "data": {"training/global_step": step} | data}) + "\n"


def write_steps(path: Path, *steps: int) -> None:
    path.write_text("".join(json.dumps({"step": s, "reward/mean": s}) + "\n" for s in steps))


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_without_lines_nothing_is_written(tmp_path: Path) -> None:
    follower = StepCopier(tmp_path / "verl.jsonl", tmp_path / "metrics.jsonl")
    assert follower.poll() == []
    (tmp_path / "verl.jsonl").touch()
    assert follower.poll() == []
    assert follower.latest is None
    assert not (tmp_path / "metrics.jsonl").exists()


def test_lines_are_flat_and_stamped(tmp_path: Path) -> None:
    source, target = tmp_path / "verl.jsonl", tmp_path / "stage" / "metrics.jsonl"
    source.write_text(entry(1, **{"reward/mean": 2.5}))
    before = time.time()
    (line,) = StepCopier(source, target).poll()
    assert read_metrics(target) == [line]
    assert (line["step"], line["reward/mean"]) == (1, 2.5)
    assert before <= line["time"] <= time.time()


def test_the_trainers_own_time_is_kept(tmp_path: Path) -> None:
    (tmp_path / "verl.jsonl").write_text(entry(1, time=12.5))
    (line,) = StepCopier(tmp_path / "verl.jsonl", tmp_path / "m.jsonl").poll()
    assert line["time"] == 12.5


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    source, target = tmp_path / "verl.jsonl", tmp_path / "metrics.jsonl"
    follower = StepCopier(source, target)
    second = entry(2)
    source.write_text(entry(1) + second[:10])
    assert [line["step"] for line in follower.poll()] == [1]
    assert follower.poll() == []
    with source.open("a") as file:
        file.write(second[10:])
    assert [line["step"] for line in follower.poll()] == [2]
    assert follower.poll() == []
    assert steps_of(target) == [1, 2]
    assert follower.latest is not None and follower.latest["step"] == 2


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)
@given(cuts=st.lists(st.integers(0, 400), max_size=8))
def test_however_the_bytes_arrive_the_lines_are_the_same(tmp_path: Path, cuts: list[int]) -> None:
    source, target = tmp_path / "verl.jsonl", tmp_path / "metrics.jsonl"
    target.unlink(missing_ok=True)
    data = "".join(entry(k, **{"reward/ä": k / 3}) for k in range(1, 6)).encode()
    follower = StepCopier(source, target)
    for end in [*sorted(cuts), len(data)]:
        source.write_bytes(data[:end])
        follower.poll()
    assert steps_of(target) == [1, 2, 3, 4, 5]
    assert read_metrics(target)[2]["reward/ä"] == 1.0


def test_only_training_steps_are_kept(tmp_path: Path) -> None:
    source, target = tmp_path / "verl.jsonl", tmp_path / "metrics.jsonl"
    source.write_text(
        json.dumps({"step": 0, "data": {"val/reward": 1}})
        + "\n"
        + json.dumps({"step": 1, "data": {"train/loss": 0.5}})
        + "\n"
    )
    assert [line["train/loss"] for line in StepCopier(source, target).poll()] == [0.5]
    assert steps_of(target) == [1]


def test_a_resumed_attempt_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    target = tmp_path / "metrics.jsonl"
    write_steps(target, 1, 2, 3, 4, 5)
    source = tmp_path / "verl-2.jsonl"
    source.write_text(entry(4) + entry(5))
    follower = StepCopier(source, target)
    follower.poll()
    with source.open("a") as file:
        file.write(entry(6))
    follower.poll()
    assert steps_of(target) == [1, 2, 3, 4, 5, 6]
    redone = [line for line in read_metrics(target) if "training/global_step" in line]
    assert [line["step"] for line in redone] == [4, 5, 6]


def test_an_attempt_without_steps_removes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "metrics.jsonl"
    write_steps(target, 1, 2)
    StepCopier(tmp_path / "none.jsonl", target).poll()
    assert steps_of(target) == [1, 2]


def test_reading_leaves_out_an_unfinished_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert steps_of(path) == [1, 2]


def test_the_metrics_of_a_checkpoint_are_added_once(tmp_path: Path) -> None:
    target, saved = tmp_path / "metrics.jsonl", tmp_path / "metrics.json"
    restore_step(target, saved)
    assert not target.exists(), "a checkpoint without saved metrics"
    saved.write_text(json.dumps({"step": 3, "reward/mean": 0.5}))
    write_steps(target, 1, 2)
    restore_step(target, saved)
    restore_step(target, saved)
    assert steps_of(target) == [1, 2, 3]
    write_steps(target, 1, 2, 3, 4)
    restore_step(target, saved)
    assert steps_of(target) == [1, 2, 3, 4], "already logged"


def test_only_steps_before_a_given_one_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    keep_steps_before(path, 3)
    assert not path.exists()
    write_steps(path, 1, 2, 3, 4)
    keep_steps_before(path, 3)
    assert steps_of(path) == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_steps_that_a_killed_command_had_not_read_are_recovered(tmp_path: Path) -> None:
    """Attempt 1 was killed after checkpoint 2 with step 1 read, attempt 2 after checkpoint 3."""
    metrics = tmp_path / "metrics.jsonl"
    logs = [tmp_path / f"attempt-{k}.jsonl" for k in (1, 2, 3)]
    logs[0].write_text(entry(1) + entry(2, x=1.0) + entry(3, x=1.0) + '{"step": 4, "da')
    logs[1].write_text(entry(3, x=2.0) + json.dumps({"step": 3, "data": {"val/loss": 1.0}}) + "\n")
    write_steps(metrics, 1)
    recover_steps(metrics, logs, newest=3)
    lines = read_metrics(metrics)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["reward/mean"] == 1, "lines that were already read stay"
    assert lines[2]["x"] == 2.0, "the last attempt of a step wins"
    before = metrics.read_bytes()
    recover_steps(metrics, logs, newest=3)
    assert metrics.read_bytes() == before


def test_steps_after_the_checkpoint_are_not_recovered(tmp_path: Path) -> None:
    log = tmp_path / "verl.jsonl"
    log.write_text(entry(1) + entry(2))
    recover_steps(tmp_path / "metrics.jsonl", [log], newest=1)
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
