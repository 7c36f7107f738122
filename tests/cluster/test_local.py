"""Nothing that a `Host` started outlives it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.launch import head
from cluster.supervise.processes import Host, Hung, Limits, StageFailed
from rcot_rl.stacks import path_of

# a child that leaves a grandchild in a session of its own behind, as a daemon would
LEAVES_A_DAEMON = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
print(child.pid, flush=True)
"""


def gone(pid: int, within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_daemon_left_by_a_finished_child_is_ended(tmp_path):
    log = tmp_path / "log.txt"
    with Host({}) as host:
        host.run(["-c", LEAVES_A_DAEMON], log)
    assert gone(int(log.read_text()))


def test_a_failing_child_raises_with_its_log(tmp_path):
    log = tmp_path / "log.txt"
    with Host({}) as host, pytest.raises(StageFailed, match="status 3") as caught:
        host.run(["-c", "print('because'); raise SystemExit(3)"], log)
    assert caught.value.log == log
    assert "because" in log.read_text()


def test_a_child_that_writes_nothing_is_ended_as_hung(tmp_path):
    log = tmp_path / "log.txt"
    with Host({}) as host, pytest.raises(StageFailed, match="hung"):
        host.run(
            ["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"],
            log,
            stall_timeout_s=1.0,
        )
    assert gone(int(log.read_text()))


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
def test_children_end_with_the_command_whatever_ends_it(tmp_path, number):
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
    assert gone(child)


HANGS = """
import os, sys, time
from rcot_rl import stacks
stacks.arm()
def waits_for_what_never_comes():
    time.sleep(600)
print(os.getpid(), flush=True)
waits_for_what_never_comes()
"""


def test_a_hung_child_says_where_it_was(tmp_path):
    log = tmp_path / "attempt-1" / "log.txt"
    with Host({}) as host, pytest.raises(Hung, match="wrote nothing"):
        host.run(["-c", HANGS], log, stall_timeout_s=3.0)
    pid = int(log.read_text())
    text = path_of(log.parent / "stacks", pid).read_text()
    assert "waits_for_what_never_comes" in text
    assert "status" in (log.parent / "stacks" / f"{pid}.proc").read_text()
    assert gone(pid)


@pytest.mark.parametrize(
    ("asker", "says"),
    [("print('asked')", "asked"), ("raise SystemExit('no Ray')", "no Ray")],
)
def test_what_runs_elsewhere_is_asked_too_and_cannot_hide_the_hang(tmp_path, asker, says):
    with Host({}) as host, pytest.raises(Hung, match="wrote nothing"):
        host.run(["-c", HANGS], tmp_path / "log.txt", stall_timeout_s=3.0, elsewhere=["-c", asker])
    assert says in (tmp_path / "stacks" / "elsewhere.txt").read_text()


def test_a_talking_child_without_progress_is_hung_too(tmp_path):
    """verl's workers go on logging while the trainer waits."""
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


def test_without_a_heartbeat_the_stages_own_steps_say_what_is_long(tmp_path, monkeypatch):
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


def test_after_a_workers_death_a_step_is_awaited_less_long(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    limits, log = Limits(heartbeat_s=3600.0, longest_s=90.0, last_beat=now), tmp_path / "log.txt"
    limits.death()
    now += 50
    limits.death()  # said again: counted from the first
    limits.check(0.0, 1000.0 + 180, log)
    with pytest.raises(Hung, match="lost a worker and made no step in the next 180 s"):
        limits.check(0.0, 1000.0 + 181, log)
    limits.beat()  # it went on without
    limits.check(0.0, now + 3000, log)
    quick = Limits(longest_s=3.0, last_beat=now)
    quick.death()
    quick.check(0.0, now + 60, log)
    with pytest.raises(Hung, match="in the next 60 s"):
        quick.check(0.0, now + 61, log)
    early = Limits(startup_s=3600.0)
    early.death()  # models are loading: nobody knows how long a step takes
    early.check(0.0, 3000.0, log)


def test_a_child_that_ends_well_leaves_no_stacks(tmp_path):
    log = tmp_path / "log.txt"
    with Host({}) as host:
        host.run(["-c", "from rcot_rl import stacks; stacks.arm()"], log)
    assert not (tmp_path / "stacks").exists()


def test_a_token_is_made_for_a_ray_of_ones_own_alone(monkeypatch):
    """A Ray that runs already has one where Ray looks for it, or none."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_OVERRIDE_JOB_RUNTIME_ENV"):
        monkeypatch.delenv(name, raising=False)
    own, joined = Host({}).environment, Host({}, own_ray=False).environment
    assert own["RAY_AUTH_MODE"] == "token" and len(own["RAY_AUTH_TOKEN"]) == 64
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(joined)
    assert own["RAY_OVERRIDE_JOB_RUNTIME_ENV"] == joined["RAY_OVERRIDE_JOB_RUNTIME_ENV"] == "1"


@pytest.mark.parametrize(
    ("there", "file", "mode"),
    [
        ({}, False, "disabled"),
        ({}, True, None),
        ({"RAY_AUTH_TOKEN": "a"}, True, "token"),
        ({"RAY_AUTH_MODE": "token"}, False, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "/x"}, False, None),
    ],
)
def test_the_head_finds_the_token_where_ray_does(monkeypatch, tmp_path, there, file, mode):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    if file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    monkeypatch.setitem(os.environ, "PROBE", "1")  # what is set below is undone with it
    head._find_token()
    assert os.environ.get("RAY_AUTH_MODE") == mode
    os.environ.pop("RAY_AUTH_MODE", None)
