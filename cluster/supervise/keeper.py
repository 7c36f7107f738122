"""Run one command and end everything that it started, even if the supervisor is killed.

    RCOT_COMMAND='["PROGRAM", "ARGUMENT", …]' python -I -S keeper.py SUPERVISOR-PID

`cluster.supervise.processes.Host` starts every child through a keeper. The keeper leads its own
session and is the reaper of all descendants of the command, including daemons in other sessions.
It ends them

- if the supervisor is gone (SIGKILL, the kernel, a crash): with KILL;
- if the command has ended: with TERM, and with KILL after PATIENCE_S. Processes that the kernel
  has not ended after another GIVE_UP_S are left to the supervisor.

It then exits with the command's status, or by the command's signal. If the keeper itself is killed,
the command dies with it, and the supervisor, the next reaper, ends the rest. Descriptors that the
keeper inherits, such as the run's lock, stay open until the last descendant has ended.

The keeper polls its parent's pid to notice that the supervisor is gone. A pipe does not work,
because processes that the supervisor forks inherit its other end. PR_SET_PDEATHSIG does not work
either: it is sent when the thread ends that started the child.

The command is passed in an environment variable, so that a search for its command line finds the
command and not the keeper. Only the standard library is imported: a start must cost milliseconds.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time

COMMAND = "RCOT_COMMAND"
"""The environment variable with the command, a JSON list."""

PATIENCE_S = 2.0
GIVE_UP_S = 20.0
_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR2)


def main() -> None:
    """Run the command, end what it leaves behind, and exit like it."""
    supervisor, command = int(sys.argv[1]), json.loads(os.environ.pop(COMMAND))
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    child = _start(command)
    _forget_pipes()
    status = None
    while status is None and os.getppid() == supervisor:
        signal.sigtimedwait({signal.SIGCHLD}, _POLL_S)
        status = _reap().get(child)
    deadline = time.monotonic() + (0.0 if status is None else PATIENCE_S)
    terminated: set[int] = set()
    while alive := descendants(os.getpid()):
        orphaned = os.getppid() != supervisor
        if not orphaned and time.monotonic() > deadline + GIVE_UP_S:
            break
        final = orphaned or time.monotonic() >= deadline
        for pid in alive if final else set(alive) - terminated:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL if final else signal.SIGTERM)
        terminated |= set(alive)
        signal.sigtimedwait({signal.SIGCHLD}, 0.05)
        status = _reap().get(child, status)
    _leave(status)


def _start(command: list[str]) -> int:
    """Fork and execute the command, which dies with this process. Returns its pid."""
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        for number in (*_IGNORED, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != keeper:  # the keeper ended before the call
            os._exit(1)
        os.setsid()  # a command that kills its own process group must not kill the keeper
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"rcot: {command[0]}: cannot be started: {error.strerror}\n")
        sys.stderr.flush()
    finally:
        os._exit(127)


def _forget_pipes() -> None:
    """Close the keeper's copies of the standard streams: readers wait for the command only."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)


def _reap() -> dict[int, int]:
    """Reap ended children. Returns wait statuses by pid."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (result := os.waitpid(-1, os.WNOHANG))[0]:
            ended[result[0]] = result[1]
    return ended


def descendants(root: int) -> list[int]:
    """Return the pids of live processes below `root`, parents first."""
    children: dict[int, list[int]] = {}
    dead = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                children.setdefault(int(parent), []).append(int(name))
                if state in (b"Z", b"X"):
                    dead.add(int(name))
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return [pid for pid in tree[1:] if pid not in dead]


def _leave(status: int | None) -> None:
    """Exit with the command's wait status, or by its signal."""
    code = 1 if status is None else os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command wrote a core dump already
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
