"""Ray's word for a host that is gone, in a log that goes on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.launch.lost_hosts import DeathWatch, LossWatch
from cluster.supervise.processes import StageFailed
from cluster.supervise.verdict import History
from rcot_rl.recipe.supervise import SuperviseSection

SAID = (
    "\x1b[33m(raylet)\x1b[0m The node with node id: "
    "0ac542701c3da65bdef900b88c347e4abb2b626801f69c74c3dac8b2 and address: 10.77.0.2 and node "
    "name: 10.77.0.2 has been marked dead because the detector has missed too many heartbeats from "
    "it. This can happen when a \t(1) raylet crashes unexpectedly (OOM, etc.) \n"
)
"""As Ray 2.60 wrote it when a host's network and processes went away."""

WAITING = "(TaskRunner pid=23899) INFO: pending: 0, running: 4, finished: 0, failure: 0\n"


def test_a_lost_host_is_named(tmp_path):
    log = tmp_path / "log.txt"
    watch = LossWatch(log)
    watch.poll()
    log.write_text(WAITING)
    watch.poll()
    log.write_text(WAITING + SAID + WAITING)
    with pytest.raises(StageFailed, match=r"^lost host 10\.77\.0\.2 ") as caught:
        watch.poll()
    assert caught.value.log == log


@settings(max_examples=60, deadline=None)
@given(before=st.integers(0, 40), cut=st.integers(0, len(SAID)))
def test_wherever_the_sentence_was_cut_it_is_found_once_it_is_whole(tmp_path_factory, before, cut):
    log = tmp_path_factory.mktemp("cut") / "log.txt"
    watch, end = LossWatch(log), SAID.index(" because")
    log.write_text(WAITING * before + SAID[:cut])
    if cut >= end:
        with pytest.raises(StageFailed):
            watch.poll()
        return
    watch.poll()
    with log.open("a") as file:
        file.write(SAID[cut:])
    with pytest.raises(StageFailed):
        watch.poll()


def test_other_lines_about_nodes_and_bytes_that_are_no_text_say_nothing(tmp_path):
    log = tmp_path / "log.txt"
    watch = LossWatch(log)
    log.write_bytes(b"\xff\xfe has been marked dead\nThe node with node id: zz and address: x\n")
    watch.poll()
    log.write_bytes(log.read_bytes() + b"The node with node id: " + b"a" * 100_000)
    watch.poll()


def test_hosts_lost_again_and_again_at_one_step_are_no_deterministic_failure(tmp_path):
    history = History(tmp_path / "grpo-aks", SuperviseSection(max_attempts=4))
    verdicts = []
    for number in range(1, 5):
        folder = tmp_path / "grpo-aks" / f"attempt-{number}"
        folder.mkdir(parents=True)
        log, said = folder / "log.txt", "lost host 10.77.0.2 (Ray: marked dead)"
        verdicts.append(history.judge("grpo-aks", said, log, 7, "RuntimeError: x"))
    assert [v.cause for v in verdicts] == ["host"] * 4
    assert [v.retry for v in verdicts] == [True, True, True, False], "up to max_attempts"


def test_the_death_of_a_worker_is_told_once(tmp_path):
    log = tmp_path / "log.txt"
    watch = DeathWatch(log)
    assert not watch.poll()
    log.write_text(WAITING)
    assert not watch.poll()
    said = "(raylet) A worker died or was killed while executing a task by an unexpected error.\n"
    with log.open("a") as file:
        file.write(said[:30])
    assert not watch.poll()
    with log.open("a") as file:
        file.write(said[30:])
    assert watch.poll()
    assert not watch.poll()
