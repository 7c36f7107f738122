"""Which failures are retried, and that each verdict is one paragraph."""

from __future__ import annotations

import errno
import json
import time

import pytest

from cluster.supervise import verdict as verdict_module
from cluster.supervise.verdict import FailureHistory, FailureVerdict
from rcot_rl.recipe.supervise_section import SuperviseSection


@pytest.fixture
def history(tmp_path) -> FailureHistory:
    return FailureHistory(tmp_path / "grpo-aks", SuperviseSection(max_attempts=4, backoff_s=2))


def judge(
    history: FailureHistory, number: int, message: str, step: int, error: str
) -> FailureVerdict:
    folder = history.stage / f"attempt-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    return history.judge(message, folder / "log.txt", step, error)


def test_a_first_failure_is_retried_and_recorded(history):
    verdict = judge(history, 1, "ended with status 1", 7, "RuntimeError: no luck")
    assert verdict.retry and verdict.cause == "error"
    for part in ("attempt-1", "after step 7", "no luck", "2 of at most 4 starts"):
        assert part in verdict.text
    assert "\n" not in verdict.text
    record = json.loads((history.stage / "attempt-1" / "verdict.json").read_text())
    assert record["text"] == verdict.text
    assert [row["step"] for row in history.failures()] == [7]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Error at 0x7f12ab34cd: x", "Error at 0x7f99ab34ff: x", True),
        ("no file /tmp/rcot-abc/ray/x", "no file /tmp/rcot-def/ray/y", True),
        (
            "actor 0123456789abcdef0123 died, pid=12",
            "actor ffff456789abcdef0123 died, pid=99",
            True,
        ),
        ("ValueError: a", "KeyError: a", False),
    ],
)
def test_the_same_error_at_the_same_step_is_not_retried_twice(history, first, second, same):
    assert judge(history, 1, "ended with status 1", 3, first).retry
    verdict = judge(history, 2, "ended with status 1", 3, second)
    assert verdict.retry is not same
    if same:
        assert "the same step with the same error" in verdict.text


def test_the_same_error_at_a_later_step_is_retried(history):
    assert judge(history, 1, "ended with status 1", 3, "E: a").retry
    assert judge(history, 2, "ended with status 1", 4, "E: a").retry


def test_retries_end_at_max_attempts(history):
    for number in range(1, 4):
        assert judge(history, number, "ended with status 1", number, f"E{number}: x").retry
    last = judge(history, 4, "ended with status 1", 9, "F: y")
    assert not last.retry and "start 4 of 4" in last.text


def test_failures_within_the_window_count_across_commands(history):
    judge(history, 1, "ended with status 1", 3, "E: a")
    later = FailureHistory(history.stage, history.section)
    assert not judge(later, 2, "ended with status 1", 3, "E: a").retry
    rows = [json.loads(r) for r in history.path.read_text().splitlines()]
    for row in rows:
        row["time"] = time.time() - 60 * 721
    history.path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"half')
    assert later.failures() == []
    assert judge(later, 3, "ended with status 1", 3, "E: a").retry


@pytest.mark.parametrize(
    ("message", "cause", "part"),
    [
        ("ended with status 137", "signal", "SIGKILL"),
        ("ended with status 143", "signal", "SIGTERM"),
        ("ended with status -9", "signal", "SIGKILL"),
        ("ended with status 1", "error", "by itself"),
        ("wrote nothing for 60 s: hung", "hang", "stacks"),
        ("made no step for 60 s: hung", "hang", "stacks"),
    ],
)
def test_cause_is_read_from_the_exit_status_or_the_hang(history, message, cause, part):
    verdict = judge(history, 1, message, 2, "E: a")
    assert (verdict.cause, verdict.retry) == (cause, True) and part in verdict.text


def test_a_passed_deadline_is_not_retried(history):
    verdict = judge(history, 1, "passed its deadline of 10 s", 2, "")
    assert (verdict.cause, verdict.retry) == ("deadline", False)


FULL = "OSError: [Errno 28] No space left on device"
QUOTA = "OSError: [Errno 122] Disk quota exceeded"
TORCH = "RuntimeError: [enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"


@pytest.mark.parametrize(
    ("state", "error", "part"),
    [
        ({"free": 1000}, FULL, "MiB are free"),
        ({"free": 1000}, TORCH, "MiB are free"),
        ({"inodes": 3}, FULL, "no inodes left"),
        ({"fault": errno.EDQUOT}, QUOTA, "quota there is used up"),
        ({"fault": errno.EDQUOT}, TORCH, "quota there is used up"),
    ],
)
def test_a_shortage_that_can_pass_is_retried_once_there_is_room(
    history, set_disk, state, error, part
):
    set_disk(**state)
    verdict = judge(history, 2, "ended with status 1", 5, error)
    assert (verdict.cause, verdict.retry) == ("disk", True)
    assert "as soon as there is room" in verdict.text and part in verdict.text
    assert verdict.place == str(history.stage / "attempt-2")
    history.section = history.section.model_copy(update={"disk_wait_minutes": 0})
    verdict = judge(history, 3, "ended with status 1", 5, error)
    assert not verdict.retry and "free some space" in verdict.text


@pytest.mark.parametrize("state", [{"read_only": True}, {"fault": errno.EROFS}])
def test_a_read_only_run_is_not_waited_for(history, set_disk, state):
    folder = history.stage / "attempt-1"
    folder.mkdir(parents=True)
    set_disk(**state)
    error = f"OSError: [Errno 30] Read-only file system: '{folder}/log.txt'"
    verdict = judge(history, 1, "ended with status 1", 5, error)
    assert (verdict.cause, verdict.retry) == ("read-only", False)
    assert "mounted read-only" in verdict.text and "does not make it writable" in verdict.text


def test_a_verdict_that_cannot_be_written_is_still_returned(history, monkeypatch):
    def refuse(self: object, *_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "/run")

    monkeypatch.setattr(FailureHistory, "_record", refuse)
    assert judge(history, 1, "ended with status 1", 5, "E: a").text


def test_a_full_mount_below_the_run_is_waited_for(history, set_disk):
    """RUN/shards may be on a file system of its own."""
    shards = history.stage.parent / "shards"
    shards.mkdir()
    set_disk(free=1000, under=shards)
    verdict = judge(history, 1, "ended with status 1", 5, f"{FULL}: '{shards}/train-0.parquet'")
    assert (verdict.cause, verdict.place) == ("disk", str(shards))


def test_a_passed_shortage_of_the_run_is_not_blamed_on_another_disk(history):
    path = history.stage / "rollouts" / "5.jsonl"
    for error in (FULL, QUOTA):
        verdict = judge(history, 1, "ended with status 1", 5, f"{error}: '{path}'")
        assert verdict.cause == "error" and "can be written again" in verdict.text
        assert "not the run's" not in verdict.text
    assert not judge(history, 2, "ended with status 1", 5, f"{QUOTA}: '{path}'").retry


@pytest.mark.parametrize("error", [FULL, QUOTA, "OSError: [Errno 30] Read-only file system"])
def test_a_full_file_system_other_than_the_runs_is_named(history, error):
    verdict = judge(history, 1, "ended with status 1", 5, f"{error}: '/scratch/tmp/x'")
    assert verdict.cause == "error" and verdict.retry
    assert "A file system that is not the run's" in verdict.text
    assert ": /scratch/tmp/x." in verdict.text


def test_a_kill_for_memory_counts_for_its_own_attempt(history, monkeypatch):
    before = verdict_module.out_of_memory_kills()
    monkeypatch.setattr(verdict_module, "out_of_memory_kills", lambda: before + 1)
    verdict = judge(history, 1, "ended with status 137", 2, "")
    assert verdict.cause == "memory" and "for memory" in verdict.text
    verdict = judge(history, 2, "ended with status 1", 2, "ValueError: bad row 7")
    assert verdict.cause == "error", "the kill belongs to the attempt before"


def test_a_full_disk_other_than_the_runs_is_not_retried_forever(history):
    causes = []
    for number in (1, 2):
        error = f"OSError: [Errno 28] No space left on device: '/ramdisk/spill/{number}'"
        verdict = judge(history, number, "ended with status 1", 5, error)
        causes.append((verdict.cause, verdict.retry))
        assert "not the run's was full: /ramdisk" in verdict.text
    assert causes == [("error", True), ("error", False)]


def test_input_at_fault_is_not_retried(history):
    verdict = judge(history, 1, "ended with status 2", 0, "rcot: a video of 900 frames is too long")
    assert (verdict.cause, verdict.retry) == ("input", False) and "900 frames" in verdict.text


def test_backoff_doubles_until_a_step_is_done(history):
    waits = []
    for number, step in enumerate([3, 3, 3, 4, 9, 9], start=1):
        judge(history, number, "ended with status 1", step, f"E{number}: x")
        waits.append(history.backoff_s())
    assert waits == [2, 4, 8, 2, 2, 4]
