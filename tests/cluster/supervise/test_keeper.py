"""A keeper ends everything that its command started, and exits like the command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.supervise import keeper
from rcot_rl import runlock
from rcot_rl.errors import InputError

KEEPER = Path(keeper.__file__)
# three processes, each in its own session; the last is a daemon that ignores TERM and HUP, like a
# rank of torchrun whose launcher was killed
NESTED = """
import os, signal, subprocess, sys, time
level = int(sys.argv[1])
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print(os.getpid(), flush=True)
if level:
    subprocess.Popen([sys.executable, __file__, str(level - 1)], start_new_session=True)
time.sleep(0 if level == 1 else 600)
"""
SUPERVISOR = """
import signal, sys
from pathlib import Path
from cluster.supervise.processes import Host
from rcot_rl.runfolder import RunFolder
def stop(*_): raise KeyboardInterrupt
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
root, preload = Path(sys.argv[1]), sys.argv[3:]
try:
    with RunFolder(root).locked() as lock, Host({}, preload, held=(lock,)) as host:
        host.run([sys.argv[2], "2"], root / "sft" / "attempt-1" / "log.txt")
except KeyboardInterrupt:
    sys.exit(130)
"""


def pids(log: Path, count: int) -> list[int]:
    """Wait for `count` pids in a log."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        words = log.read_text().split() if log.is_file() else []
        if len(words) >= count:
            return [int(w) for w in words]
        time.sleep(0.02)
    raise AssertionError(log.read_text() if log.is_file() else "no log")


@pytest.fixture
def supervise(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[bytes], list[int]]]:
    """Start a supervisor of the run folder `tmp_path / "run"`; returns it and its processes."""
    script, nested = tmp_path / "supervisor.py", tmp_path / "nested.py"
    script.write_text(SUPERVISOR)
    nested.write_text(NESTED)
    (tmp_path / "run").mkdir()

    def start(*preload: str) -> tuple[subprocess.Popen[bytes], list[int]]:
        process = subprocess.Popen([sys.executable, script, tmp_path / "run", nested, *preload])
        return process, pids(tmp_path / "run/sft/attempt-1/log.txt", 3)

    return start


@pytest.mark.parametrize("preload", [(), ("decimal",)], ids=["plain", "zygote"])
@pytest.mark.parametrize("number", ["SIGHUP", "SIGTERM", "SIGQUIT", "SIGKILL"])
def test_nested_sessions_end_with_the_supervisor(
    supervise, number: str, preload: tuple, living
) -> None:
    process, started = supervise(*preload)
    everything = started + [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.Signals[number])
    status = process.wait(timeout=30)
    orderly = number in ("SIGHUP", "SIGTERM")
    assert status == (130 if orderly else -signal.Signals[number])
    assert not living(everything)


def test_processes_of_a_killed_keeper_end(supervise, living) -> None:
    """The supervisor is the next reaper."""
    process, started = supervise()
    for child in psutil.Process(process.pid).children():
        child.kill()
    assert process.wait(timeout=30) == 1  # StageFailed
    assert not living(started)


def test_a_killed_command_keeps_the_lock_until_its_processes_are_gone(
    supervise, tmp_path, monkeypatch, living
) -> None:
    process, started = supervise()
    keepers = [p.pid for p in psutil.Process(process.pid).children()]
    message = f"process {process.pid} .*`kill {process.pid}`"
    with pytest.raises(InputError, match=message), runlock.hold(tmp_path / "run"):
        pass
    for pid in keepers:
        os.kill(pid, signal.SIGSTOP)  # as slow as a busy host makes them
    process.kill()
    process.wait()
    with monkeypatch.context() as short:
        short.setattr(runlock, "ENDING_S", 0.3)
        message = rf"still work on this run: {keepers[0]} .*kill -9"
        with pytest.raises(InputError, match=message), runlock.hold(tmp_path / "run"):
            pass
    assert living(started, within=0)
    for pid in keepers:
        os.kill(pid, signal.SIGCONT)
    with runlock.hold(tmp_path / "run"):  # waits for them
        assert not living([*started, *keepers], within=0)


def test_processes_that_outlive_supervisor_and_keeper_are_named(
    supervise, tmp_path, monkeypatch, living
) -> None:
    monkeypatch.setattr(runlock, "ENDING_S", 0.3)
    process, started = supervise()
    for pid in [*(p.pid for p in psutil.Process(process.pid).children()), process.pid]:
        os.kill(pid, signal.SIGSTOP)
    for pid in [*(p.pid for p in psutil.Process(process.pid).children()), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    left = living(started, within=1)
    assert left, "nothing ends the daemon"
    try:
        with pytest.raises(InputError) as caught, runlock.hold(tmp_path / "run"):
            pass
        assert f"`kill -9 {' '.join(map(str, sorted(left)))}`" in str(caught.value)
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not living(left)
    with runlock.hold(tmp_path / "run"):
        pass


def test_the_commands_own_log_below_run_is_allowed(tmp_path: Path) -> None:
    """`rcot run … | tee RUN/console.txt`, or a shell that redirects into RUN."""
    script = (
        "import sys; from pathlib import Path; from rcot_rl import runlock\n"
        "with runlock.hold(Path(sys.argv[1])): print('held')"
    )
    (tmp_path / "notes").mkdir()
    log, command = tmp_path / "notes" / "log.txt", f'"{sys.executable}" -c "$0" "$1"; true'
    with log.open("w") as output, (tmp_path / "tee.txt").open("w") as tee:
        other = subprocess.Popen(["sleep", "60"], stdout=tee)
        try:
            subprocess.run(["sh", "-c", command, script, str(tmp_path)], stdout=output, timeout=60)
        finally:
            other.kill()
            other.wait()
    assert log.read_text() == "held\n"


def kept(*command: str, **options) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-I", "-S", str(KEEPER), str(os.getpid())]
    environment = os.environ | {keeper.COMMAND: json.dumps(command)}
    return subprocess.Popen(words, env=environment, start_new_session=True, **options)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.kill(os.getpid(), 15)", -15),
        ("import os; os.abort()", -6),
        ("import os; os.killpg(0, 9)", -9),
    ],
)
def test_a_keeper_exits_like_its_command(code: str, status: int) -> None:
    assert kept(sys.executable, "-c", code).wait(timeout=30) == status


def test_a_command_that_cannot_be_started_is_reported(tmp_path: Path) -> None:
    process = kept(str(tmp_path / "absent"), stderr=subprocess.PIPE)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 127
    assert b"cannot be started: No such file or directory" in error


def test_a_command_has_default_signals_its_streams_and_its_own_session() -> None:
    code = (
        "import os, signal, sys; print(sys.stdin.read(), os.getsid(0) == os.getpid(),"
        "signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.pthread_sigmask(0, []),"
        "os.environ.get('RCOT_COMMAND'))"
    )
    process = kept(sys.executable, "-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, _ = process.communicate(b"word", timeout=30)
    assert out.decode().split() == ["word", "True", "True", "set()", "None"]


def test_a_daemon_left_behind_gets_term_first(tmp_path: Path) -> None:
    """A logger can then write its last lines."""
    daemon = tmp_path / "daemon.py"
    daemon.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('last', flush=True), sys.exit()))\n"
        "print('up', flush=True); time.sleep(600)\n"
    )
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {str(daemon)!r}], start_new_session=True)\n"
        "time.sleep(1)"
    )
    process = kept(sys.executable, "-c", code, stdout=subprocess.PIPE)
    assert process.communicate(timeout=30)[0].split() == [b"up", b"last"]
    assert process.returncode == 0


# one write each: torchrun's ranks are unbuffered, and share a log
RANKS = """
import os, time
os.write(1, b"rank %d\\n" % os.getpid())
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGHUP", "SIGKILL"])
def test_ranks_of_torchrun_end_with_the_supervisor(tmp_path: Path, number: str, living) -> None:
    """As on CUDA: without a zygote, torchrun starts each rank in a session of its own."""
    ranks, script = tmp_path / "ranks.py", tmp_path / "supervisor.py"
    ranks.write_text(RANKS)
    launcher = '["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", sys.argv[2]]'
    script.write_text(SUPERVISOR.replace('[sys.argv[2], "2"]', launcher))
    process = subprocess.Popen([sys.executable, script, tmp_path, ranks])
    try:
        log = tmp_path / "sft/attempt-1/log.txt"
        end = time.monotonic() + 120
        started: list[int] = []
        while len(started) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
            text = log.read_text() if log.is_file() else ""
            started = [int(pid) for pid in re.findall(r"^rank (\d+)$", text, re.MULTILINE)]
        assert len({os.getsid(pid) for pid in started}) == 2
        process.send_signal(signal.Signals[number])
        process.wait(timeout=30)
        assert not living(started)
    finally:
        process.kill()  # a failure here must not affect other tests
        process.wait(timeout=30)
