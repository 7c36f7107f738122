"""No process that a `Host` started outlives it, however it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cluster.supervise.processes import Host, Hung, Limits, StageFailed
from rcot_rl.system.stacks import path_of

# a child that leaves a daemon behind, in its own session
LEAVES_A_DAEMON = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
print(child.pid, flush=True)
"""


def test_a_daemon_left_by_a_finished_child_is_ended(tmp_path, living):
    log = tmp_path / "log.txt"
    with Host({}) as host:
        host.run(["-c", LEAVES_A_DAEMON], log)
    assert not living([int(log.read_text())], within=10)


def test_a_failing_child_raises_with_its_log(tmp_path):
    log = tmp_path / "log.txt"
    with Host({}) as host, pytest.raises(StageFailed, match="status 3") as caught:
        host.run(["-c", "print('because'); raise SystemExit(3)"], log)
    assert caught.value.log == log
    assert "because" in log.read_text()


def test_a_child_that_writes_nothing_is_ended_as_hung(tmp_path, living):
    log = tmp_path / "log.txt"
    with Host({}) as host, pytest.raises(StageFailed, match="hung"):
        host.run(
            ["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"],
            log,
            stall_timeout_s=1.0,
        )
    assert not living([int(log.read_text())], within=10)


def test_a_failing_child_is_noticed_although_descendants_are_reaped(tmp_path):
    for _ in range(3):
        with Host({}) as host, pytest.raises(StageFailed, match="status 1"):
            host.run(["-c", LEAVES_A_DAEMON + "\nraise SystemExit(1)"], tmp_path / "log.txt")


def test_environment_reaches_children(tmp_path):
    with Host({"MARK": "here"}) as host:
        host.run(
            ["-c", "import os; print(os.environ['MARK'], os.environ['MORE'])"],
            tmp_path / "log.txt",
            environment={"MORE": "too"},
        )
    assert (tmp_path / "log.txt").read_text().split() == ["here", "too"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_children_end_with_the_command_whatever_ends_it(tmp_path, number, living):
    script = tmp_path / "command.py"
    script.write_text(
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from cluster.supervise.processes import Host\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "try:\n"
        "    with Host({}) as host:\n"
        "        host.run(['-c', 'import os,time; print(os.getpid(), flush=True); "
        "time.sleep(600)'], Path(sys.argv[1]))\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    log = tmp_path / "log.txt"
    command = subprocess.Popen([sys.executable, str(script), str(log)])
    for _ in range(400):
        if log.is_file() and log.read_text().strip():
            break
        time.sleep(0.05)
    child = int(log.read_text())
    os.kill(command.pid, number)
    status = command.wait(timeout=30)
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert not living([child], within=10)


HANGS = """
import os, sys, time
from rcot_rl.system import stacks
stacks.arm()
def waits_for_what_never_comes():
    time.sleep(600)
print(os.getpid(), flush=True)
waits_for_what_never_comes()
"""


def test_the_stacks_of_a_hung_child_are_written(tmp_path, living):
    log = tmp_path / "attempt-1" / "log.txt"
    with Host({}) as host, pytest.raises(Hung, match="wrote nothing"):
        host.run(["-c", HANGS], log, stall_timeout_s=3.0)
    pid = int(log.read_text())
    text = path_of(log.parent / "stacks", pid).read_text()
    assert "waits_for_what_never_comes" in text
    assert "status" in (log.parent / "stacks" / f"{pid}.proc").read_text()
    assert not living([pid], within=10)


@pytest.mark.parametrize(
    ("asker", "output"),
    [("print('asked')", "asked"), ("raise SystemExit('no Ray')", "no Ray")],
)
def test_other_hosts_are_asked_for_stacks_and_cannot_hide_the_hang(tmp_path, asker, output):
    with Host({}) as host, pytest.raises(Hung, match="wrote nothing"):
        host.run(["-c", HANGS], tmp_path / "log.txt", stall_timeout_s=3.0, elsewhere=["-c", asker])
    assert output in (tmp_path / "stacks" / "elsewhere.txt").read_text()


def test_a_child_that_logs_without_progress_is_hung(tmp_path):
    """verl's workers keep logging while the trainer waits."""
    log = tmp_path / "log.txt"
    talks = "import time\nwhile True: print('still here', flush=True); time.sleep(0.1)"
    limits = Limits(startup_s=60, heartbeat_s=1.5)
    limits.beat()
    with Host({}) as host, pytest.raises(Hung, match="made no step for"):
        host.run(["-c", talks], log, limits=limits)
    with Host({}) as host, pytest.raises(Hung, match="in its first"):
        host.run(["-c", talks], log, limits=Limits(startup_s=1.0))
    with Host({}) as host, pytest.raises(StageFailed, match="deadline") as caught:
        host.run(["-c", talks], log, limits=Limits(deadline_s=1.0))
    assert not isinstance(caught.value, Hung)


def test_without_a_heartbeat_the_limit_follows_the_longest_step(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    limits, log = Limits(startup_s=3600.0), tmp_path / "log.txt"
    for pause in (300.0, 200.0, 90.0):  # start-up, then two steps
        now += pause
        limits.beat()
    limits.check(1000.0, now + 10 * 200.0, log)
    with pytest.raises(Hung, match="no step for 2000 s"):
        limits.check(1000.0, now + 10 * 200.0 + 1, log)
    quick = Limits(longest_s=2.0, last_beat=now)
    quick.check(1000.0, now + 600.0, log)  # a save takes longer than a quick step
    with pytest.raises(Hung, match="no step for 600 s"):
        quick.check(1000.0, now + 601.0, log)
    once = Limits(startup_s=700.0, last_beat=now)
    with pytest.raises(Hung, match="no step for 700 s"):
        once.check(1000.0, now + 701.0, log)


def test_after_a_worker_death_the_next_step_must_come_sooner(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    limits, log = Limits(heartbeat_s=3600.0, longest_s=90.0, last_beat=now), tmp_path / "log.txt"
    limits.death()
    now += 50
    limits.death()  # reported again: the first report counts
    limits.check(0.0, 1000.0 + 180, log)
    with pytest.raises(Hung, match="lost a worker and made no step in the next 180 s"):
        limits.check(0.0, 1000.0 + 181, log)
    limits.beat()  # the child continued
    limits.check(0.0, now + 3000, log)
    quick = Limits(longest_s=3.0, last_beat=now)
    quick.death()
    quick.check(0.0, now + 60, log)
    with pytest.raises(Hung, match="in the next 60 s"):
        quick.check(0.0, now + 61, log)
    early = Limits(startup_s=3600.0)
    early.death()  # models are loading: the length of a step is unknown
    early.check(0.0, 3000.0, log)


def test_a_successful_child_leaves_no_stacks(tmp_path):
    log = tmp_path / "log.txt"
    with Host({}) as host:
        host.run(["-c", "from rcot_rl.system import stacks; stacks.arm()"], log)
    assert not (tmp_path / "stacks").exists()


def test_only_a_hosts_own_ray_gets_a_token(monkeypatch):
    """A Ray that is already running has its token where Ray looks for it, or has none."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_OVERRIDE_JOB_RUNTIME_ENV"):
        monkeypatch.delenv(name, raising=False)
    started, joined = Host({}).environment, Host({}, own_ray=False).environment
    assert started["RAY_AUTH_MODE"] == "token" and len(started["RAY_AUTH_TOKEN"]) == 64
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(joined)
    assert started["RAY_OVERRIDE_JOB_RUNTIME_ENV"] == joined["RAY_OVERRIDE_JOB_RUNTIME_ENV"] == "1"
