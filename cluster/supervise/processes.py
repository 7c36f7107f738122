"""The processes of a run on this host: started here, watched here, and none of them outlives it.

A run's stages are child processes (verl starts Ray, Ray starts workers, vLLM starts an engine).
`Host` makes this process the reaper of every descendant that loses its parent, so that at the end,
after Ctrl-C, or after a failure, all of them are found and ended. Each child leads a session of its
own: the terminal's Ctrl-C reaches this process alone, which then ends the others in order. If this
process is killed, each child's keeper (cluster/supervise/keeper.py) ends what the child started.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from cluster.supervise import keeper
from cluster.supervise.zygote import write_client
from rcot_rl import variables
from rcot_rl.stacks import FOLDER, SIGNAL, path_of

_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)
_KEEPER = Path(keeper.__file__)
_KEEPER_EXIT_S = 10.0
"""How long a keeper may take to leave once all processes below it are gone."""
_ELSEWHERE_S = 60.0
"""How long other hosts may take to ask their processes for stacks."""


class StageFailed(Exception):
    """A stage's process failed or hung; `log` is where it says why."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.log = log


class Hung(StageFailed):
    """A stage's process waits for something that does not come."""


PATIENCE = 10
LEAST_HEARTBEAT_S = 600.0
AFTER_A_DEATH = 2
LEAST_AFTER_A_DEATH_S = 60.0


@dataclass
class Limits:
    """How long a child may take, beyond being silent."""

    deadline_s: float | None = None
    heartbeat_s: float | None = None
    """Seconds without `beat`, after the first; None: PATIENCE times the longest pause so far, at
    least LEAST_HEARTBEAT_S."""
    startup_s: float | None = None
    """Seconds before the first `beat` and, without `heartbeat_s`, before the second."""
    last_beat: float | None = None
    longest_s: float | None = None
    """The longest pause between two beats."""
    died: float | None = None
    """When a worker of the child was said to have died, and no beat came since."""

    def beat(self) -> None:
        """The child has made progress."""
        now = time.monotonic()
        if self.last_beat is not None:
            self.longest_s = max(self.longest_s or 0.0, now - self.last_beat)
        self.last_beat, self.died = now, None

    def death(self) -> None:
        """A worker of the child has died. It may go on without, or wait for it for ever: the next
        beat has to come within AFTER_A_DEATH times the longest pause so far, or a minute."""
        self.died = self.died or time.monotonic()

    def check(self, started: float, now: float, log: Path) -> None:
        """Raises StageFailed when a limit has passed. Times are of the monotonic clock."""
        if self.deadline_s is not None and now - started > self.deadline_s:
            raise StageFailed(f"passed its deadline of {self.deadline_s:.0f} s", log)
        if self.last_beat is None:
            if self.startup_s is not None and now - started > self.startup_s:
                raise Hung(f"made no step in its first {self.startup_s:.0f} s: hung", log)
            return
        most = self._pause_s()
        if most is not None and now - self.last_beat > most:
            raise Hung(f"made no step for {most:.0f} s: hung", log)
        if self.died is not None and self.longest_s is not None:
            soon = max(LEAST_AFTER_A_DEATH_S, AFTER_A_DEATH * self.longest_s)
            if now - self.died > soon:
                raise Hung(f"lost a worker and made no step in the next {soon:.0f} s: hung", log)

    def _pause_s(self) -> float | None:
        """The longest that a beat may be waited for, after the first."""
        if self.heartbeat_s is not None:
            return self.heartbeat_s
        if self.longest_s is None:
            return self.startup_s
        return max(LEAST_HEARTBEAT_S, PATIENCE * self.longest_s)


class Host:
    """A context in which processes are run; leaving it ends all of them.

    environment: added for every child to this process' own, as `rcot_rl.variables` cleans it.
    preload: modules that a zygote imports once, for children to be forked with; none: children
    start as ordinary interpreters.
    own_ray: children start a Ray of their own; False: they join one, whose token they must find
    where Ray looks for it.
    held: descriptors that stay open until all children are gone, such as a lock's.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        preload: Sequence[str] = (),
        log: Path | None = None,
        own_ray: bool = True,
        held: Sequence[int] = (),
    ) -> None:
        self.environment = variables.for_children(os.environ, own_ray) | dict(environment)
        if own_ray:
            # Ray's processes agree on a token, or each would look for one of its own
            self.environment.setdefault("RAY_AUTH_MODE", "token")
            self.environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # inside a Ray job, whose environment has some of the same variables
        self.environment.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        self._preload = list(preload)
        self._log = log
        self._before: set[int] = set()
        self._own: set[int] = set()
        self._held = tuple(held)
        self._keepers: dict[int, subprocess.Popen[bytes]] = {}
        self._zygote: subprocess.Popen[bytes] | None = None
        self._zygote_pid: int | None = None
        self._ready = threading.Event()
        self._folder: Path | None = None
        self.memory = MemoryWatch()

    def __enter__(self) -> Self:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._before = {p.pid for p in psutil.Process().children(recursive=True)}
        self._folder = Path(tempfile.mkdtemp(prefix="rcot-"))
        self.environment["RAY_TMPDIR"] = str(self._folder / "ray")
        (self._folder / "ray").mkdir()
        # sockets that vLLM's processes leave behind when they are killed
        self.environment["VLLM_RPC_BASE_PATH"] = str(self._folder)
        if self._preload:
            self._start_zygote()
        self.memory.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.memory.stop()
        with _signals_held():
            if self._zygote is not None and self._zygote.stdin is not None:
                with contextlib.suppress(OSError):
                    self._zygote.stdin.close()
            self.end_children(patience=0.0 if kind else 5.0)
            for child in list(self._keepers.values()):
                self._end_keeper(child)
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def python(self) -> str:
        """The interpreter that children are started with; Ray is told to use it too."""
        client = self.environment.get("RCOT_ZYGOTE_PYTHON")
        return client or sys.executable

    def run(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        watch: Callable[[], None] = lambda: None,
        stall_timeout_s: float = 1800.0,
        limits: Limits | None = None,
        elsewhere: Sequence[str] = (),
    ) -> float:
        """Run one child to its end; its output goes to `log`. Returns the seconds it took.

        watch: called about four times a second. elsewhere: arguments of a process that asks for the
        stacks of a hung child's workers that are not this process' descendants.

        Raises StageFailed when the child fails, when it writes nothing for `stall_timeout_s` (verl
        has states in which it waits for ever), and when it passes one of `limits`. The stacks of a
        hung child's processes are written first, to `stacks` beside the log.
        """
        self._await_zygote()
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        stacks = log.parent / "stacks"
        with log.open("ab") as output:
            child = self._start(
                [self.python, *arguments],
                self.environment | dict(environment or {}) | {FOLDER: str(stacks)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            code = self._wait(child, log, watch, stall_timeout_s, limits or Limits())
        except Hung:
            self._dump_stacks(stacks)
            self._ask_elsewhere(elsewhere, stacks)
            raise
        finally:
            keep = frozenset({self._zygote_pid} if self._zygote_pid else ())
            with _signals_held():
                self.end_children(patience=2.0, keep=keep)
                self._end_keeper(child, keep)
            _remove_silent(stacks)
        watch()
        if code != 0:
            raise StageFailed(f"ended with status {code}", log)
        return time.monotonic() - started

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a command below a keeper, whose pid and status the result has."""
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_KEEPER), str(os.getpid())],
            env={**environment, keeper.COMMAND: json.dumps(list(command))},
            start_new_session=True,
            pass_fds=self._held,
            **options,
        )
        self._own.add(child.pid)
        self._keepers[child.pid] = child
        return child

    def _end_keeper(
        self, child: subprocess.Popen[bytes], keep: frozenset[int] = frozenset()
    ) -> None:
        """Wait for a keeper whose processes were ended, and end those that it starts even now."""
        deadline = time.monotonic() + _KEEPER_EXIT_S
        while child.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.5)
                break
            self.end_children(patience=0.0, keep=keep)
        self._keepers.pop(child.pid, None)

    def _wait(
        self,
        child: subprocess.Popen[bytes],
        log: Path,
        watch: Callable[[], None],
        stall_timeout_s: float,
        limits: Limits,
    ) -> int:
        started = time.monotonic()
        size, changed = -1, started
        while (code := child.poll()) is None:
            watch()
            now, at = log.stat().st_size, time.monotonic()
            if now != size:
                size, changed = now, at
            elif at - changed > stall_timeout_s:
                raise Hung(f"wrote nothing for {stall_timeout_s:.0f} s: hung", log)
            limits.check(started, at, log)
            time.sleep(0.25)
        return code

    def _dump_stacks(self, folder: Path) -> None:
        """Ask every process that can answer for its stacks, and note what the others wait for."""
        folder.mkdir(parents=True, exist_ok=True)
        silent = []
        for process in self._descendants(frozenset()):
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                lines = [" ".join(process.cmdline())[:400], f"status {process.status()}"]
                for name in ("wchan", "status"):
                    lines.append(Path(f"/proc/{process.pid}/{name}").read_text(errors="replace"))
                (folder / f"{process.pid}.proc").write_text("\n".join(lines), encoding="utf-8")
                if path_of(folder, process.pid).is_file():
                    process.send_signal(SIGNAL)
                else:
                    silent.append(f"{process.pid} {lines[0]}")
        time.sleep(1.0)
        (folder / "silent.txt").write_text("\n".join(silent) + "\n", encoding="utf-8")

    def _ask_elsewhere(self, arguments: Sequence[str], folder: Path) -> None:
        """Whatever comes of it is in `elsewhere.txt`: the hang must be told of in any case."""
        if not arguments:
            return
        with (folder / "elsewhere.txt").open("wb") as output, contextlib.suppress(OSError):
            asker = self._start(
                [sys.executable, *arguments], self.environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            with contextlib.suppress(subprocess.TimeoutExpired):
                asker.wait(timeout=_ELSEWHERE_S)  # what is left ends with the hung child
        time.sleep(1.0)

    def end_children(self, patience: float, keep: frozenset[int] = frozenset()) -> None:
        """End every descendant started since `__enter__`, but for `keep`; TERM first, then KILL."""
        deadline = time.monotonic() + patience
        while True:
            alive = self._descendants(keep)
            if not alive:
                return
            final = time.monotonic() >= deadline
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill() if final else process.terminate()
            _, alive = psutil.wait_procs(alive, timeout=1.0)
            if final and not alive and not self._descendants(keep):
                return
            if time.monotonic() > deadline + 20:
                return  # unkillable: in the kernel's hands

    def _descendants(self, keep: frozenset[int]) -> list[psutil.Process]:
        _reap(self._own | self._before)
        out = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                dead = process.status() == psutil.STATUS_ZOMBIE
                if not dead and process.pid not in self._before | self._keepers.keys() | keep:
                    out.append(process)
        return out

    def _start_zygote(self) -> None:
        assert self._folder is not None
        client = write_client(self._folder)
        self.environment["RCOT_ZYGOTE_PYTHON"] = str(client)
        self.environment["PYTHON_EXEC"] = str(client)  # torchrun's name for it
        output = self._log.open("ab") if self._log else subprocess.DEVNULL
        self._zygote = self._start(
            [
                sys.executable,
                "-m",
                "cluster.supervise.zygote",
                str(self._folder / "socket"),
                *self._preload,
            ],
            self.environment | {"OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
        )
        threading.Thread(target=self._read_until_ready, daemon=True).start()

    def _read_until_ready(self) -> None:
        assert self._zygote is not None and self._zygote.stdout is not None
        for line in self._zygote.stdout:
            if line.startswith(b"pid "):
                self._zygote_pid = int(line.split()[1])
            elif line == b"ready\n":
                self._ready.set()
        self._ready.set()  # it ended: clients then start ordinary interpreters

    def _await_zygote(self) -> None:
        if self._zygote is not None:
            self._ready.wait()


def _remove_silent(stacks: Path) -> None:
    """Files of processes that were never asked."""
    if stacks.is_dir():
        for path in stacks.glob("*.stack"):
            if path.stat().st_size == 0:
                path.unlink()
        with contextlib.suppress(OSError):
            stacks.rmdir()


class MemoryWatch:
    """The largest sum of this process tree's PSS since the last `restart`, sampled every few
    seconds."""

    def __init__(self, interval_s: float = 3.0) -> None:
        self._peak_bytes = 0
        self._lock = threading.Lock()
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def restart(self) -> None:
        """Forget what was seen before: another stage begins."""
        with self._lock:
            self._peak_bytes = 0

    def peak_bytes(self) -> int:
        """The largest sum since the last `restart`, this moment's included."""
        self._sample()
        return self._peak_bytes

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        me = psutil.Process()
        with self._lock:  # a sum that was begun before `restart` must not survive it
            tree = [me, *me.children(recursive=True)]
            self._peak_bytes = max(self._peak_bytes, sum(_pss(p.pid) for p in tree))


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return 0
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _reap(own: set[int]) -> None:
    """Collect adopted processes that have ended; Popen collects those it started, `own`."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.status() == psutil.STATUS_ZOMBIE and child.pid not in own:
                os.waitpid(child.pid, os.WNOHANG)


@contextlib.contextmanager
def _signals_held():  # type: ignore[no-untyped-def]
    """A second Ctrl-C, or a terminal that closes, must not cut the clean-up short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    old = {n: signal.signal(n, signal.SIG_IGN) for n in ends}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
