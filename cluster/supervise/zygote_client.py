"""Stands in for `python`: asks the zygote to fork a process for this command line.

The zygote writes an executable copy of this file with its socket's path in the first lines, and
names it as Ray's `py_executable` and as multiprocessing's. Standard library only, started with
`-I -S`: it must cost milliseconds. What the zygote cannot serve is executed by the real python.
"""

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
    status = _receive(connection, 8)  # the child's end; nothing if the zygote is gone
    return int.from_bytes(status, "big") if status else 1


def _request(arguments):
    """What to run, or None for what only a real interpreter can."""
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


def _open_numbers():
    numbers = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue  # the directory's own descriptor
        numbers.append(int(name))
    return sorted(numbers)


def _receive(connection, count):
    data = b""
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        if not chunk:
            return b""
        data += chunk
    return data


def _forward(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main())
