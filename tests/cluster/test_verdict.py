"""What is started again, what is not, and that it is said in one paragraph."""

from __future__ import annotations

import errno
import json
import time

import pytest

from cluster.supervise import verdict as module
from cluster.supervise.verdict import History
from rcot_rl.recipe.supervise import SuperviseSection


@pytest.fixture
def history(tmp_path) -> History:
    return History(tmp_path / "grpo-aks", SuperviseSection(max_attempts=4, backoff_s=2))


def judged(history: History, number: int, message: str, step: int, error: str):
    folder = history.path.parent / f"attempt-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    return history.judge("grpo-aks", message, folder / "log.txt", step, error)


def test_a_first_failure_is_tried_again_and_noted(history):
    found = judged(history, 1, "ended with status 1", 7, "RuntimeError: no luck")
    assert found.retry and found.cause == "error"
    for part in ("attempt-1", "after step 7", "no luck", "2 of at most 4 starts"):
        assert part in found.text
    assert "\n" not in found.text
    noted = json.loads((history.path.parent / "attempt-1" / "verdict.json").read_text())
    assert noted["text"] == found.text
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
def test_the_same_error_at_the_same_step_is_not_tried_a_third_time(history, first, second, same):
    assert judged(history, 1, "ended with status 1", 3, first).retry
    found = judged(history, 2, "ended with status 1", 3, second)
    assert found.retry is not same
    if same:
        assert "the same step with the same error" in found.text


def test_progress_in_between_makes_it_another_failure(history):
    assert judged(history, 1, "ended with status 1", 3, "E: a").retry
    assert judged(history, 2, "ended with status 1", 4, "E: a").retry


def test_so_many_starts_and_no_more(history):
    for number in range(1, 4):
        assert judged(history, number, "ended with status 1", number, f"E{number}: x").retry
    last = judged(history, 4, "ended with status 1", 9, "F: y")
    assert not last.retry and "start 4 of 4" in last.text


def test_old_failures_are_forgotten_and_new_commands_remember(history):
    judged(history, 1, "ended with status 1", 3, "E: a")
    again = History(history.path.parent, history.section)
    assert not judged(again, 2, "ended with status 1", 3, "E: a").retry
    rows = [json.loads(r) for r in history.path.read_text().splitlines()]
    for row in rows:
        row["time"] = time.time() - 60 * 721
    history.path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"half')
    assert again.failures() == []
    assert judged(again, 3, "ended with status 1", 3, "E: a").retry


@pytest.mark.parametrize(
    ("message", "cause", "says"),
    [
        ("ended with status 137", "signal", "SIGKILL"),
        ("ended with status 143", "signal", "SIGTERM"),
        ("ended with status -9", "signal", "SIGKILL"),
        ("ended with status 1", "error", "by itself"),
        ("wrote nothing for 60 s: hung", "hang", "stacks"),
        ("made no step for 60 s: hung", "hang", "stacks"),
    ],
)
def test_causes(history, message, cause, says):
    found = judged(history, 1, message, 2, "E: a")
    assert (found.cause, found.retry) == (cause, True) and says in found.text


def test_what_starting_again_cannot_mend(history):
    found = judged(history, 1, "passed its deadline of 10 s", 2, "")
    assert (found.cause, found.retry) == ("deadline", False)


FULL = "OSError: [Errno 28] No space left on device"
QUOTA = "OSError: [Errno 122] Disk quota exceeded"
TORCH = "RuntimeError: [enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"


@pytest.mark.parametrize(
    ("state", "error", "says"),
    [
        ({"free": 1000}, FULL, "MiB are free"),
        ({"free": 1000}, TORCH, "MiB are free"),
        ({"inodes": 3}, FULL, "no inodes left"),
        ({"fault": errno.EDQUOT}, QUOTA, "quota there is used up"),
        ({"fault": errno.EDQUOT}, TORCH, "quota there is used up"),
    ],
)
def test_what_can_free_itself_is_waited_for(history, set_disk, state, error, says):
    set_disk(**state)
    found = judged(history, 2, "ended with status 1", 5, error)
    assert (found.cause, found.retry) == ("disk", True)
    assert "as soon as there is room" in found.text and says in found.text
    assert found.place == str(history.path.parent / "attempt-2")
    history.section = history.section.model_copy(update={"disk_wait_minutes": 0})
    found = judged(history, 3, "ended with status 1", 5, error)
    assert not found.retry and "free some space" in found.text


@pytest.mark.parametrize("state", [{"read_only": True}, {"fault": errno.EROFS}])
def test_a_read_only_run_is_not_waited_for(history, set_disk, state):
    folder = history.path.parent / "attempt-1"
    folder.mkdir(parents=True)
    set_disk(**state)
    error = f"OSError: [Errno 30] Read-only file system: '{folder}/log.txt'"
    found = judged(history, 1, "ended with status 1", 5, error)
    assert (found.cause, found.retry) == ("read-only", False)
    assert "mounted read-only" in found.text and "does not become writable" in found.text


def test_a_verdict_that_cannot_be_written_is_still_given(history, monkeypatch):
    def refuse(self: object, *_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "/run")

    monkeypatch.setattr(History, "_note", refuse)
    assert judged(history, 1, "ended with status 1", 5, "E: a").text


def test_a_mount_inside_the_run_is_the_runs(history, set_disk):
    """RUN/shards may be on a file system of its own."""
    shards = history.path.parent.parent / "shards"
    shards.mkdir()
    set_disk(free=1000, under=shards)
    found = judged(history, 1, "ended with status 1", 5, f"{FULL}: '{shards}/train-0.parquet'")
    assert (found.cause, found.place) == ("disk", str(shards))


def test_a_shortage_of_the_run_that_has_passed_is_not_another_disks(history):
    path = history.path.parent / "rollouts" / "5.jsonl"
    for error in (FULL, QUOTA):
        found = judged(history, 1, "ended with status 1", 5, f"{error}: '{path}'")
        assert found.cause == "error" and "can be written again" in found.text
        assert "not the run's" not in found.text
    assert not judged(history, 2, "ended with status 1", 5, f"{QUOTA}: '{path}'").retry


@pytest.mark.parametrize("error", [FULL, QUOTA, "OSError: [Errno 30] Read-only file system"])
def test_another_file_system_is_named(history, error):
    found = judged(history, 1, "ended with status 1", 5, f"{error}: '/scratch/tmp/x'")
    assert found.cause == "error" and found.retry
    assert "A file system that is not the run's" in found.text
    assert ": /scratch/tmp/x." in found.text


def test_a_kill_for_memory_is_told_from_others(history, monkeypatch):
    before = module.out_of_memory_kills()
    monkeypatch.setattr(module, "out_of_memory_kills", lambda: before + 1)
    found = judged(history, 1, "ended with status 137", 2, "")
    assert found.cause == "memory" and "for memory" in found.text
    found = judged(history, 2, "ended with status 1", 2, "ValueError: bad row 7")
    assert found.cause == "error", "that kill was the attempt's before"


def test_a_full_disk_that_is_not_the_runs_does_not_start_again_for_ever(history):
    causes = []
    for number in (1, 2):
        said = f"OSError: [Errno 28] No space left on device: '/ramdisk/spill/{number}'"
        found = judged(history, number, "ended with status 1", 5, said)
        causes.append((found.cause, found.retry))
        assert "not the run's was full: /ramdisk" in found.text
    assert causes == [("error", True), ("error", False)]


def test_input_at_fault_is_not_tried_again(history):
    found = judged(history, 1, "ended with status 2", 0, "rcot: a video of 900 frames is too long")
    assert (found.cause, found.retry) == ("input", False) and "900 frames" in found.text


def test_waits_grow_while_no_step_is_done_between_failures(history):
    waits = []
    for number, step in enumerate([3, 3, 3, 4, 9, 9], start=1):
        judged(history, number, "ended with status 1", step, f"E{number}: x")
        waits.append(history.backoff_s())
    assert waits == [2, 4, 8, 2, 2, 4]
