"""Start, watch and end the processes of a run on this host.

A run's stages are child processes: verl starts Ray, Ray starts workers, vLLM starts an engine.
`Host` makes this process the reaper of every descendant that loses its parent, so that all of them
are found and ended when a stage ends or fails, and after Ctrl-C. Each child leads its own session:
the terminal's Ctrl-C reaches only this process, which then ends the others in order. If this
process is killed, each child's keeper (cluster/supervise/keeper.py) ends the child's processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from cluster.supervise import keeper
from cluster.supervise.companion import Companion
from cluster.supervise.zygote import write_client
from rcot_rl.system import variables
from rcot_rl.system.machine import pss_bytes
from rcot_rl.system.stacks import FOLDER, SIGNAL, path_of

logger = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)
_KEEPER = Path(keeper.__file__)
_KEEPER_EXIT_S = 10.0
"""Seconds that a keeper may take to exit once all processes below it have ended."""
_ELSEWHERE_S = 60.0
"""Seconds that other hosts may take to collect stacks."""

HEARTBEAT_FACTOR = 10
"""Without `heartbeat_s`, a step may take this many times the longest pause between two steps."""
MIN_HEARTBEAT_S = 600.0
DEATH_FACTOR = 2
"""The same after Ray reported a worker death."""
MIN_AFTER_DEATH_S = 60.0


class StageFailed(Exception):
    """A stage's process failed or hung."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.log = log


class Hung(StageFailed):
    """A stage's process stopped making progress."""


@dataclass
class Limits:
    """How long a child may run, and how long its steps may take."""

    deadline_s: float | None = None
    heartbeat_s: float | None = None
    """Longest pause between two beats, in seconds. None: HEARTBEAT_FACTOR times the longest pause
    so far, and at least MIN_HEARTBEAT_S."""
    startup_s: float | None = None
    """Seconds until the first beat and, without `heartbeat_s`, also until the second."""
    last_beat: float | None = None
    longest_s: float | None = None
    """The longest pause between two beats so far."""
    died: float | None = None
    """When a worker death was reported, if no beat came since."""

    def beat(self) -> None:
        """Record progress of the child."""
        now = time.monotonic()
        if self.last_beat is not None:
            self.longest_s = max(self.longest_s or 0.0, now - self.last_beat)
        self.last_beat, self.died = now, None

    def death(self) -> None:
        """Record the death of a worker.

        The child may continue without the worker, or wait for it forever. The next beat must come
        within DEATH_FACTOR times the longest pause so far, and at least MIN_AFTER_DEATH_S.
        """
        self.died = self.died or time.monotonic()

    def check(self, started: float, now: float, log: Path) -> None:
        """Raise StageFailed if a limit has passed. Times are of the monotonic clock."""
        if self.deadline_s is not None and now - started > self.deadline_s:
            raise StageFailed(f"passed its deadline of {self.deadline_s:.0f} s", log)
        if self.last_beat is None:
            if self.startup_s is not None and now - started > self.startup_s:
                raise Hung(f"made no step in its first {self.startup_s:.0f} s: hung", log)
            return
        limit = self._pause_limit_s()
        if limit is not None and now - self.last_beat > limit:
            raise Hung(f"made no step for {limit:.0f} s: hung", log)
        if self.died is not None and self.longest_s is not None:
            limit = max(MIN_AFTER_DEATH_S, DEATH_FACTOR * self.longest_s)
            if now - self.died > limit:
                raise Hung(f"lost a worker and made no step in the next {limit:.0f} s: hung", log)

    def _pause_limit_s(self) -> float | None:
        """Return the longest allowed pause after the first beat; None if there is no limit."""
        if self.heartbeat_s is not None:
            return self.heartbeat_s
        if self.longest_s is None:
            return self.startup_s
        return max(MIN_HEARTBEAT_S, HEARTBEAT_FACTOR * self.longest_s)


class Host:
    """A context that runs processes; leaving it ends all of them.

    Args:
        environment: Added to this process' own environment, cleaned by
            `rcot_rl.system.variables`, for every child.
        preload: Modules that a zygote imports once and forks children with. Empty: children start
            as ordinary interpreters.
        own_ray: True if children start their own Ray; False if they join one, whose token Ray
            must find in its usual places.
        held: Descriptors that stay open until all children have ended, such as a lock's.
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
            # Ray's processes must share one token
            self.environment.setdefault("RAY_AUTH_MODE", "token")
            self.environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # the command may run inside a Ray job that sets some of the same variables
        self.environment.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        self._preload = list(preload)
        self._log = log
        self._before: set[int] = set()
        """Descendants that are older than this context."""
        self._started: set[int] = set()
        self._held = tuple(held)
        self._keepers: dict[int, subprocess.Popen[bytes]] = {}
        self._companions: list[Companion] = []
        self._zygote: subprocess.Popen[bytes] | None = None
        self._zygote_pid: int | None = None
        self._ready = threading.Event()
        self._folder: Path | None = None
        self.memory = MemoryWatch(self._companion_pids)

    def __enter__(self) -> Self:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._before = {p.pid for p in psutil.Process().children(recursive=True)}
        self._folder = Path(tempfile.mkdtemp(prefix="rcot-"))
        self.environment["RAY_TMPDIR"] = str(self._folder / "ray")
        (self._folder / "ray").mkdir()
        # killed vLLM processes leave their sockets in this folder
        self.environment["VLLM_RPC_BASE_PATH"] = str(self._folder)
        if self._preload:
            self._start_zygote()
        self.memory.start()
        logger.info(
            "started the process host: temporary files in %s, %d modules preloaded",
            self._folder,
            len(self._preload),
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self.memory.stop()
        with _signals_held():
            if self._zygote is not None and self._zygote.stdin is not None:
                with contextlib.suppress(OSError):
                    self._zygote.stdin.close()
            for companion in self._companions:
                companion.kill()
            self.end_children(patience=0.0 if kind else 5.0)
            for child in list(self._keepers.values()):
                self._end_keeper(child)
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def python(self) -> str:
        """The interpreter that starts children; Ray uses it too."""
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
    ) -> None:
        """Run one child to its end.

        If the child hangs, the Python stacks of its processes are written to the folder `stacks`
        next to the log before it is ended.

        Args:
            arguments: Of the Python interpreter.
            log: The child's output is appended here.
            watch: Called about four times a second, and once after the child has ended.
            stall_timeout_s: Seconds without output after which the child is hung: verl has states
                in which it waits forever.
            elsewhere: Arguments of a process that collects the stacks of workers which are not
                descendants of this process.

        Raises:
            StageFailed: The child failed, or passed its deadline.
            Hung: The child stopped making progress.
        """
        self._await_zygote()
        log.parent.mkdir(parents=True, exist_ok=True)
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

    def start_companion(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> Companion:
        """Start a process that is kept while stages start and end, with its own children.

        It does not hold the descriptors `held`, and its memory is not part of `memory`. Its output
        is lost if the log cannot be opened.

        Args:
            arguments: Of the Python interpreter.
            log: The output is appended here.
            environment: Added to the children's environment.
        """
        with contextlib.ExitStack() as stack:
            output: Any = subprocess.DEVNULL
            with contextlib.suppress(OSError):
                log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(log.open("ab"))
            process = self._start(
                [sys.executable, *arguments],
                self.environment | dict(environment),
                held=(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        companion = Companion(process)
        self._companions.append(companion)
        return companion

    def _companion_pids(self) -> set[int]:
        """Return the pids of companions and of all processes below them."""
        running = [c.pid for c in self._companions if c.status is None]
        return {pid for root in running for pid in (root, *keeper.descendants(root))}

    def _start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        held: Sequence[int] | None = None,
        **options: Any,
    ) -> subprocess.Popen[bytes]:
        """Start a command below a keeper; the result has the keeper's pid and status."""
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_KEEPER), str(os.getpid())],
            env={**environment, keeper.COMMAND: json.dumps(list(command))},
            start_new_session=True,
            pass_fds=self._held if held is None else held,
            **options,
        )
        self._started.add(child.pid)
        self._keepers[child.pid] = child
        return child

    def _end_keeper(
        self, child: subprocess.Popen[bytes], keep: frozenset[int] = frozenset()
    ) -> None:
        """Wait until a keeper exits; end processes that were started in the meantime."""
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
        """Return the child's exit status. Raises StageFailed if a limit passes."""
        started = time.monotonic()
        size, changed = -1, started
        while (code := child.poll()) is None:
            watch()
            new_size, now = log.stat().st_size, time.monotonic()
            if new_size != size:
                size, changed = new_size, now
            elif now - changed > stall_timeout_s:
                raise Hung(f"wrote nothing for {stall_timeout_s:.0f} s: hung", log)
            limits.check(started, now, log)
            time.sleep(0.25)
        return code

    def _dump_stacks(self, folder: Path) -> None:
        """Ask every armed process for its stacks; record the kernel state of all of them."""
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
        """Collect stacks on other hosts; the output is in `elsewhere.txt`.

        Failures are ignored: the hang must be reported in any case.
        """
        if not arguments:
            return
        with (folder / "elsewhere.txt").open("wb") as output, contextlib.suppress(OSError):
            asker = self._start(
                [sys.executable, *arguments],
                self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                asker.wait(timeout=_ELSEWHERE_S)  # what is left ends with the hung child
        time.sleep(1.0)

    def end_children(self, patience: float, keep: frozenset[int] = frozenset()) -> None:
        """End the descendants started since `__enter__`: TERM first, then KILL.

        Args:
            patience: Seconds between TERM and KILL.
            keep: Pids that are not ended.
        """
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
                return  # blocked in the kernel

    def _descendants(self, keep: frozenset[int]) -> list[psutil.Process]:
        _reap(self._started | self._before)
        tree = psutil.Process().children(recursive=True)
        # listed after the tree: what is below a companion stays below it while its keeper lives
        kept = self._before | self._keepers.keys() | keep | self._companion_pids()
        descendants = []
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                dead = process.status() == psutil.STATUS_ZOMBIE
                if not dead and process.pid not in kept:
                    descendants.append(process)
        return descendants

    def _start_zygote(self) -> None:
        assert self._folder is not None
        client = write_client(self._folder)
        self.environment["RCOT_ZYGOTE_PYTHON"] = str(client)
        self.environment["PYTHON_EXEC"] = str(client)  # torchrun starts ranks with it
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
        self._ready.set()  # the zygote ended: its clients start ordinary interpreters

    def _await_zygote(self) -> None:
        if self._zygote is not None:
            self._ready.wait()


def _remove_silent(stacks: Path) -> None:
    """Remove the empty files of processes that were not asked for stacks."""
    if stacks.is_dir():
        for path in stacks.glob("*.stack"):
            if path.stat().st_size == 0:
                path.unlink()
        with contextlib.suppress(OSError):
            stacks.rmdir()


_WATCH_SHARE = 0.01
"""Largest share of a core that `MemoryWatch` uses."""


class MemoryWatch:
    """Samples the memory of this process tree: the peak of its summed PSS since `restart`.

    The kernel walks all pages of a process for its PSS, which takes longer for larger processes and
    stops them meanwhile if they map memory. So a sample that takes long delays the next one.

    Args:
        excluded: Returns pids that do not count, such as those of trackers: the peak is a stage's.
        interval_s: Smallest number of seconds between two samples.
    """

    def __init__(self, excluded: Callable[[], set[int]] = set, interval_s: float = 3.0) -> None:
        self._excluded = excluded
        self._peak_bytes = 0
        self._lock = threading.Lock()
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start sampling in a thread."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def restart(self) -> None:
        """Reset the peak, because another stage starts."""
        with self._lock:
            self._peak_bytes = 0

    def peak_bytes(self) -> int:
        """Return the peak since the last `restart`, in bytes, including a sample taken now."""
        self._sample()
        return self._peak_bytes

    def _run(self) -> None:
        interval_s = self._interval_s
        while not self._stop.wait(interval_s):
            started = time.thread_time()
            self._sample()
            interval_s = max(self._interval_s, (time.thread_time() - started) / _WATCH_SHARE)

    def _sample(self) -> None:
        me = psutil.Process()
        with self._lock:  # a sample that started before `restart` must not count after it
            tree = {p.pid for p in (me, *me.children(recursive=True))} - self._excluded()
            self._peak_bytes = max(self._peak_bytes, sum(pss_bytes(pid) for pid in tree))


def _reap(excluded: set[int]) -> None:
    """Reap adopted children that ended; not those of `excluded`, which their Popen reaps."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.status() == psutil.STATUS_ZOMBIE and child.pid not in excluded:
                os.waitpid(child.pid, os.WNOHANG)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Ignore signals during the clean-up: a second Ctrl-C must not interrupt it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {n: signal.signal(n, signal.SIG_IGN) for n in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
