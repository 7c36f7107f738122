"""Stand-in for `python` that asks the zygote to fork a process for its command line.

The zygote writes an executable copy of this file, with the path of its socket filled in, and
registers it as Ray's `py_executable` and as multiprocessing's executable. The copy runs with
`-I -S` and imports only the standard library: a start must cost milliseconds. Command lines that
the zygote does not support are executed by the real interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys

SOCKET = "@SOCKET@"
PYTHON = "@PYTHON@"
PLAIN_FLAGS = {"-u", "-B", "-I", "-E", "-s", "-S"}


def main() -> int:
    """Run this process' command line. Returns the exit status."""
    request = _request(sys.argv[1:])
    if request is None:
        os.execv(PYTHON, [PYTHON, *sys.argv[1:]])
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(SOCKET)
    except OSError:
        os.execv(PYTHON, [PYTHON, *sys.argv[1:]])
    numbers = [n for n in _open_numbers() if n != connection.fileno()]
    request |= {"env": dict(os.environ), "cwd": os.getcwd(), "fds": numbers}
    payload = json.dumps(request).encode()
    socket.send_fds(connection, [len(payload).to_bytes(8, "big")], numbers)
    connection.sendall(payload)
    pid = int.from_bytes(_receive(connection, 8), "big")
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        signal.signal(getattr(signal, name), lambda number, _: _forward(pid, number))
    status = _receive(connection, 8)  # empty if the zygote is gone
    return int.from_bytes(status, "big") if status else 1


def _request(arguments: list[str]) -> dict[str, object] | None:
    """Return what the zygote shall run; None if only a real interpreter can."""
    rest = list(arguments)
    while rest and rest[0] in PLAIN_FLAGS:
        rest.pop(0)
    if not rest:
        return None
    if rest[0] in ("-m", "-c"):
        kind = {"-m": "module", "-c": "code"}[rest[0]]
        return {"kind": kind, "what": rest[1], "arguments": rest[2:]} if len(rest) > 1 else None
    if rest[0].startswith("-"):
        return None
    return {"kind": "script", "what": rest[0], "arguments": rest[1:]}


def _open_numbers() -> list[int]:
    """Return this process' open descriptors."""
    numbers = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue  # the descriptor of /proc/self/fd itself
        numbers.append(int(name))
    return sorted(numbers)


def _receive(connection: socket.socket, count: int) -> bytes:
    """Read `count` bytes; empty if the connection ends before."""
    data = b""
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        if not chunk:
            return b""
        data += chunk
    return data


def _forward(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main())
