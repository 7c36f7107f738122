"""The guard's child process and its pipes: start, exchange of lines, end.

`guard_child.py` is the other side. Messages are JSON, never pickle. A child ends with its parent
(it asks the kernel to be killed then) and with `close`, which also kills the processes it started.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rcot_rl.errors import InputError
from reward_fns.user.sources import FileSource, UserSource
from reward_fns.user.user_load import Style
from reward_fns.user.user_result import DIED, TIMEOUT

START_S = 120.0
"""Time for the imports of the user's file: torch takes long on a busy machine."""
STDERR_KEPT = 4096
"""Number of bytes kept of the function's latest output."""

_CHILD = Path(__file__).with_name("guard_child.py")


class CallFailed(Exception):
    """A call gave no results; `code` is TIMEOUT or DIED."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Traits:
    """How to call the function, as its child reports it."""

    style: Style
    batch: bool
    is_async: bool
    row_keys: frozenset[str] | None
    """Row keys that it accepts; None: all."""
    components: tuple[str, ...] | None
    """Declared by COMPONENTS."""
    digest: str


class Child:
    """A process and its pipes. Not thread-safe."""

    def __init__(self, source: UserSource, constants: Mapping[str, Any]) -> None:
        self.process = _spawn()
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.pipe_in, self.pipe_out = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.pipe_err = self.process.stderr.fileno()
        for pipe in (self.pipe_in, self.pipe_out, self.pipe_err):
            os.set_blocking(pipe, False)
        self._poller = select.poll()
        self._poller.register(self.pipe_out, select.POLLIN)
        self._poller.register(self.pipe_err, select.POLLIN)
        self._printed: deque[bytes] = deque()
        self._answer = bytearray()
        self._end = weakref.finalize(self, _end, self.process, os.getpid())
        try:
            self.traits = self._load(source, constants)
        except BaseException:
            self.close()
            raise

    def _load(self, source: UserSource, constants: Mapping[str, Any]) -> Traits:
        first: dict[str, Any] = {"name": source.name, "constants": dict(constants)}
        if isinstance(source, FileSource):
            first["path"] = str(source.path.resolve())
            first["source"] = base64.b64encode(source.source).decode("ascii")
            where: dict[str, Any] = {"file": source.path}
        else:
            first["module"] = source.module
            where = {"file": source.spec}
        try:
            answer = json.loads(self.exchange(encode(first), START_S))
        except CallFailed as error:
            raise InputError(f"does not load: {error}", **where) from error
        if "error" in answer:
            raise InputError(answer["error"], line=answer["line"], key=answer["key"], **where)
        keys, names = answer["row_keys"], answer["components"]
        return Traits(
            style=answer["style"],
            batch=answer["batch"],
            is_async=answer["is_async"],
            row_keys=None if keys is None else frozenset(keys),
            components=None if names is None else tuple(names),
            digest=source.digest if isinstance(source, FileSource) else answer["digest"],
        )

    def exchange(self, line: bytes, timeout_s: float) -> bytes:
        """Send one line, return one line. After CallFailed the child is unusable."""
        end = time.monotonic() + timeout_s
        view, sending = memoryview(line), True
        view = view[self.write(view) :]
        if view:
            self._poller.register(self.pipe_in, select.POLLOUT)
        else:
            sending = False
        try:
            while True:
                left = end - time.monotonic()
                if left <= 0:
                    raise CallFailed(TIMEOUT, f"took longer than {timeout_s:g} s{self.printed()}")
                for pipe, _ in self._poller.poll(math.ceil(left * 1000)):
                    if pipe == self.pipe_out:
                        answer = self.read_line()
                        if answer is not None:
                            return answer
                    elif pipe == self.pipe_err:
                        self.drain()
                    elif sending:
                        view = view[self.write(view) :]
                        if not view:
                            self._poller.unregister(self.pipe_in)
                            sending = False
        finally:
            if sending:
                self._poller.unregister(self.pipe_in)

    def write(self, view: memoryview) -> int:
        """Return the number of bytes written. Raises CallFailed if the pipe is closed."""
        try:
            return os.write(self.pipe_in, view)
        except BlockingIOError:
            return 0
        except OSError:
            raise self.died() from None

    def read_line(self) -> bytes | None:
        """Return the next answer, or None if it is incomplete. Raises CallFailed."""
        try:
            chunk = os.read(self.pipe_out, 2**16)
        except BlockingIOError:
            return None
        if not chunk:
            raise self.died()
        self._answer += chunk
        if not chunk.endswith(b"\n"):
            return None
        answer, self._answer = bytes(self._answer), bytearray()
        return answer

    def drain(self) -> bool:
        """Read the function's output and keep its end. Return False at end of file."""
        try:
            chunk = os.read(self.pipe_err, 2**16)
        except BlockingIOError:
            return True
        if not chunk:
            with contextlib.suppress(KeyError):
                self._poller.unregister(self.pipe_err)
        self._printed.append(chunk[-STDERR_KEPT:])
        while sum(map(len, self._printed)) > 2 * STDERR_KEPT:
            self._printed.popleft()
        return bool(chunk)

    def printed(self) -> str:
        """Return the last lines of the function's output, to append to a message."""
        text = b"".join(self._printed)[-STDERR_KEPT:].decode("utf-8", "replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return "; it printed: " + " | ".join(lines[-3:]) if lines else ""

    def died(self) -> CallFailed:
        """Return the error that describes how the process ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        with contextlib.suppress(OSError):
            self.drain()
        code = self.process.returncode
        if code is None:
            how = "closed its pipes"
        else:
            how = f"was killed by {_signal(-code)}" if code < 0 else f"exited with status {code}"
        return CallFailed(DIED, f"its process {how}{self.printed()}")

    def close(self) -> None:
        """End the process. Idempotent."""
        self._end()


def encode(message: Any) -> bytes:
    """Return one line of JSON. NumPy values become plain ones; others raise InputError."""
    try:
        return json.dumps(message, default=_plain).encode("ascii") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be passed to a reward function: {error}", key="row") from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is not JSON")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_SPAWNER: tuple[int, ThreadPoolExecutor] | None = None


def _spawn() -> subprocess.Popen[bytes]:
    """Start a child from a lasting thread: PR_SET_PDEATHSIG is sent when the thread ends."""
    global _SPAWNER
    if _SPAWNER is None or _SPAWNER[0] != os.getpid():
        _SPAWNER = (os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="reward-guard"))
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return (
        _SPAWNER[1]
        .submit(
            subprocess.Popen,
            [sys.executable, "-P", str(_CHILD), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        .result()
    )


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a forked copy must not end its parent's child
        return
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes it started
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
