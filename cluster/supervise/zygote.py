"""Fork the processes of a local run from one process that has imported everything.

A GRPO stage of verl is ten Python processes, and on a small host nearly all of its start-up time is
their imports: torch, transformers, vLLM and verl, ten times. The zygote imports them once and
forks: a process then starts in milliseconds and shares the modules' memory. Only single-host CPU
runs use it (`cluster.supervise.processes`); workers of a cluster start as Ray starts them.

    python -m cluster.supervise.zygote SOCKET MODULE…     serve until the parent closes stdin

Ray starts workers through it by its documented `py_executable`, multiprocessing by
`set_executable`; see `zygote_client`. The socket is in a folder of mode 0700. Code given with `-c`
is never executed here: only the two forms that multiprocessing itself writes are understood.

A fork is safe as long as the zygote has one thread and has opened no engine, no Ray and no device:
`serve` checks the threads, and the preloaded modules only import.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import json
import os
import random
import re
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcot_rl.system import stacks

CLIENT = Path(__file__).with_name("zygote_client.py")
_SPAWN = re.compile(
    r"from multiprocessing\.spawn import spawn_main; spawn_main\(([\w=, ]{0,200})\)"
)
_TRACKER = re.compile(r"from multiprocessing\.resource_tracker import main;main\((\d{1,9})\)")
_MAX_REQUEST = 16 * 2**20
_MAX_FDS = 253  # the kernel's SCM_MAX_FD


def write_client(folder: Path) -> Path:
    """Write the executable that stands in for `python` and connects to this folder's socket."""
    text = CLIENT.read_text(encoding="utf-8")
    text = text.replace("@SOCKET@", str(folder / "socket")).replace("@PYTHON@", sys.executable)
    path = folder / "python"
    path.write_text(f"#!{sys.executable} -IS\n{text}", encoding="utf-8")
    path.chmod(0o700)
    return path


@dataclass
class _ForkedChild:
    """A forked process, and the connection to the client that asked for it."""

    pid: int
    connection: socket.socket


def serve(path: str, modules: list[str]) -> None:
    """Import `modules`, fork on request until stdin closes, and end all children."""
    # Ray reads these once, at import, in a worker's process: a new Ray with one driver gives its
    # job the number 1, and a worker ends when the process with this pid ends
    os.environ["RAY_JOB_ID"] = "01000000"
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
    with _ids_from_the_kernel() if "ray" in modules else contextlib.nullcontext():
        for module in modules:
            __import__(module)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        sys.stderr.write(f"zygote: {threads} threads after imports; forks may lose locks\n")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    print(f"pid {os.getpid()}\nready", flush=True)
    children: dict[int, _ForkedChild] = {}
    try:
        while _turn(listener, wake_read, wake_write, children):
            pass
    finally:
        for child in children.values():
            _kill(child.pid)


@contextlib.contextmanager
def _ids_from_the_kernel() -> Iterator[None]:
    """Draw the ids of Ray's actor classes from the kernel.

    Ray draws ids from a per-process generator. Once the generator has started, forks share its
    state: two agent workers then call an engine with tasks of the same id, and Ray ends the engine.
    Importing actor classes is all that draws ids in the zygote.
    """
    import ray.actor

    actor_module: Any = ray.actor
    id_class = actor_module.ActorClassID

    class KernelActorClassID:
        @staticmethod
        def from_random() -> Any:
            return id_class(os.urandom(id_class.size()))

    actor_module.ActorClassID = KernelActorClassID
    try:
        yield
    finally:
        actor_module.ActorClassID = id_class


def _turn(
    listener: socket.socket, wake_read: int, wake_write: int, children: dict[int, _ForkedChild]
) -> bool:
    """Serve one round of events. Returns False once stdin is closed."""
    watched: list[Any] = [listener, wake_read, 0, *(c.connection for c in children.values())]
    ready, _, _ = select.select(watched, [], [])
    if 0 in ready and not os.read(0, 4096):
        return False
    if wake_read in ready:
        os.read(wake_read, 4096)
        _reap(children)
    for child in list(children.values()):
        if child.connection in ready:
            _kill(child.pid)  # its client was ended, which means that the child shall end
    if listener in ready:
        connection, _ = listener.accept()
        sockets = [listener, *(c.connection for c in children.values())]
        forked = _fork(connection, sockets, [wake_read, wake_write])
        if forked is not None:
            children[forked.pid] = forked
    return True


def _reap(children: dict[int, _ForkedChild]) -> None:
    """Reap ended children and send their exit statuses to their clients."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        child = children.pop(pid, None)
        if child is not None:
            code = os.waitstatus_to_exitcode(status)
            code = 128 - code if code < 0 else code
            with contextlib.suppress(OSError):  # the client may have ended
                child.connection.sendall(code.to_bytes(8, "big"))
            child.connection.close()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _fork(
    connection: socket.socket, sockets: list[socket.socket], pipes: list[int]
) -> _ForkedChild | None:
    """Read a client's request and fork a process for it; None if the request is invalid.

    Args:
        sockets: Closed in the child, with `connection`.
        pipes: Descriptors that are closed in the child.
    """
    connection.settimeout(10)
    fds: list[int] = []
    try:
        head, fds, _, _ = socket.recv_fds(connection, 8, _MAX_FDS)
        size = int.from_bytes(head, "big")
        if len(head) != 8 or size > _MAX_REQUEST:
            raise ValueError("not a request")
        payload = b""
        while len(payload) < size:
            chunk = connection.recv(min(65536, size - len(payload)))
            if not chunk:
                raise ValueError("request cut short")
            payload += chunk
        request = json.loads(payload)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"zygote: refused a request: {error}\n")
        connection.close()
        _close(fds)
        return None
    pid = os.fork()
    if pid == 0:
        _become(request, fds, [*sockets, connection], pipes)
    _close(fds)
    connection.settimeout(None)
    try:
        connection.sendall(pid.to_bytes(8, "big"))
    except OSError:
        _kill(pid)
    return _ForkedChild(pid, connection)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _become(
    request: dict[str, Any], fds: list[int], sockets: list[socket.socket], pipes: list[int]
) -> None:
    """In the child: adopt the client's descriptors, environment and command. Never returns."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for item in sockets:
            item.close()
        _close(pipes)
        _take_descriptors(request["fds"], fds)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        _reset_inherited_state()
        stacks.arm()
        code = _run(request["kind"], request["what"], request["arguments"])
    except SystemExit as error:
        code = _exit_code(error)
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code)


def _take_descriptors(numbers: list[int], fds: list[int]) -> None:
    """Move the received descriptors `fds` to the client's `numbers`."""
    # first above all numbers, so that none is overwritten
    high = max([*numbers, *fds]) + 1
    lifted = []
    for fd in fds:
        os.dup2(fd, high, inheritable=False)
        os.close(fd)
        lifted.append(high)
        high += 1
    for fd, number in zip(lifted, numbers, strict=True):
        os.dup2(fd, number, inheritable=True)
        os.close(fd)


def _reset_inherited_state() -> None:
    """Reset state that a fork shares with the zygote and a new interpreter would not."""
    import multiprocessing

    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules and os.environ.get("OMP_NUM_THREADS", "").isdigit():
        # libgomp read the variable when the zygote loaded it
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    client = os.environ.get("RCOT_ZYGOTE_PYTHON")
    if client:
        multiprocessing.set_executable(client)


def _run(kind: str, target: str, arguments: list[str]) -> int:
    """Run a module, a script or multiprocessing's code. Returns the exit status."""
    if kind == "code":
        return _run_multiprocessing(target, arguments)
    sys.argv = [target, *arguments]
    if kind == "script":
        sys.path.insert(0, str(Path(target).resolve().parent))
        runpy.run_path(target, run_name="__main__")
    else:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    return 0


def _run_multiprocessing(code: str, arguments: list[str]) -> int:
    sys.argv = ["-c", *arguments]
    if match := _SPAWN.fullmatch(code):
        from multiprocessing.spawn import spawn_main

        pairs = (item.split("=") for item in match[1].split(",") if item.strip())
        spawn_main(**{name.strip(): ast.literal_eval(value.strip()) for name, value in pairs})
        return 0
    if match := _TRACKER.fullmatch(code):
        from multiprocessing.resource_tracker import main

        main(int(match[1]))
        return 0
    os.execv(sys.executable, [sys.executable, "-c", code, *arguments])


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    sys.stderr.write(f"{error.code}\n")
    return 1


def _leave(code: int) -> None:
    """Exit as the interpreter does: threads and exit functions first."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for non-daemon threads
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
