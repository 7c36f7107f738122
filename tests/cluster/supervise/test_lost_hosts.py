"""Ray's reports of lost hosts and dead workers are found in a growing log."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.supervise.lost_hosts import DeathWatch, LossWatch
from cluster.supervise.processes import StageFailed
from cluster.supervise.verdict import FailureHistory
from rcot_rl.recipe.supervise_section import SuperviseSection

REPORT = (
    "\x1b[33m(raylet)\x1b[0m The node with node id: "
    "0ac542701c3da65bdef900b88c347e4abb2b626801f69c74c3dac8b2 and address: 10.77.0.2 and node "
    "name: 10.77.0.2 has been marked dead because the detector has missed too many heartbeats from "
    "it. This can happen when a \t(1) raylet crashes unexpectedly (OOM, etc.) \n"
)
"""Written by Ray 2.60 when a host lost its network and its processes."""

WAITING = "(TaskRunner pid=23899) INFO: pending: 0, running: 4, finished: 0, failure: 0\n"


def test_a_lost_host_is_named(tmp_path):
    log = tmp_path / "log.txt"
    watch = LossWatch(log)
    watch.poll()
    log.write_text(WAITING)
    watch.poll()
    log.write_text(WAITING + REPORT + WAITING)
    with pytest.raises(StageFailed, match=r"^lost host 10\.77\.0\.2 ") as caught:
        watch.poll()
    assert caught.value.log == log


@settings(max_examples=60, deadline=None)
@given(before=st.integers(0, 40), cut=st.integers(0, len(REPORT)))
def test_a_report_that_is_read_in_two_parts_is_found_once_complete(tmp_path_factory, before, cut):
    log = tmp_path_factory.mktemp("cut") / "log.txt"
    watch, end = LossWatch(log), REPORT.index(" because")
    log.write_text(WAITING * before + REPORT[:cut])
    if cut >= end:
        with pytest.raises(StageFailed):
            watch.poll()
        return
    watch.poll()
    with log.open("a") as file:
        file.write(REPORT[cut:])
    with pytest.raises(StageFailed):
        watch.poll()


def test_similar_lines_and_binary_data_are_ignored(tmp_path):
    log = tmp_path / "log.txt"
    watch = LossWatch(log)
    log.write_bytes(b"\xff\xfe has been marked dead\nThe node with node id: zz and address: x\n")
    watch.poll()
    log.write_bytes(log.read_bytes() + b"The node with node id: " + b"a" * 100_000)
    watch.poll()


def test_hosts_lost_repeatedly_at_one_step_are_retried(tmp_path):
    history = FailureHistory(tmp_path / "grpo-aks", SuperviseSection(max_attempts=4))
    verdicts = []
    for number in range(1, 5):
        folder = tmp_path / "grpo-aks" / f"attempt-{number}"
        folder.mkdir(parents=True)
        log, message = folder / "log.txt", "lost host 10.77.0.2 (Ray: marked dead)"
        verdicts.append(history.judge(message, log, 7, "RuntimeError: x"))
    assert [v.cause for v in verdicts] == ["host"] * 4
    assert [v.retry for v in verdicts] == [True, True, True, False], "up to max_attempts"


def test_a_worker_death_is_reported_once(tmp_path):
    log = tmp_path / "log.txt"
    watch = DeathWatch(log)
    assert not watch.poll()
    log.write_text(WAITING)
    assert not watch.poll()
    report = "(raylet) A worker died or was killed while executing a task by an unexpected error.\n"
    with log.open("a") as file:
        file.write(report[:30])
    assert not watch.poll()
    with log.open("a") as file:
        file.write(report[30:])
    assert watch.poll()
    assert not watch.poll()
