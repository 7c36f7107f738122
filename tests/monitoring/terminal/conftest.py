"""Pseudo-terminals for tests of terminal output."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence

import pytest

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\x1b\][^\x07]*\x07")


class TerminalProgram:
    """A Python program that runs on a pseudo-terminal."""

    def __init__(
        self, arguments: Sequence[str], columns: int = 80, rows: int = 24, **environment: str
    ) -> None:
        self.leader, follower = pty.openpty()
        self.resize(columns, rows)
        self.settings = termios.tcgetattr(follower)
        self.follower = follower
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.child = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**inherited, "TERM": "xterm-256color", **environment},
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )
        self.output = ""

    def read_until(self, text: str, seconds: float = 30) -> None:
        """Read the output until it has `text` after what was read before."""
        before, deadline = len(self.output), time.monotonic() + seconds
        while text not in self.output[before:]:
            assert time.monotonic() < deadline, self.output[before:]
            self._read(0.1)

    def resize(self, columns: int, rows: int = 24) -> None:
        """Change the size of the terminal."""
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, size)

    def press(self, key: bytes) -> None:
        """Type a key."""
        os.write(self.leader, key)

    def end(self, seconds: float = 30) -> int:
        """Return the exit status once the program has ended."""
        deadline = time.monotonic() + seconds
        while self.child.poll() is None:
            assert time.monotonic() < deadline, self.output
            self._read(0.1)
        self._read(0.1)
        after = termios.tcgetattr(self.follower)
        os.close(self.follower)
        os.close(self.leader)
        assert after == self.settings, "the terminal's settings are restored"
        return self.child.returncode

    def frames(self) -> list[list[str]]:
        """Return the lines of each frame that was drawn from the screen's corner."""
        screen = self.output.partition("\x1b[?1049l")[0]
        parts = screen.replace("\r\n", "\n").split("\x1b[H")
        return [CONTROL.sub("", part).rstrip("\n").split("\n") for part in parts[1:]]

    def _read(self, seconds: float) -> None:
        while select.select([self.leader], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                self.output += os.read(self.leader, 65536).decode(errors="replace")
                return


@pytest.fixture
def terminal_program():
    """Return the class; programs that still run are ended after the test."""
    programs: list[TerminalProgram] = []

    def start(*arguments: str, **options: object) -> TerminalProgram:
        programs.append(TerminalProgram(arguments, **options))
        return programs[-1]

    yield start
    for program in programs:
        if program.child.poll() is None:
            program.child.kill()
            program.child.wait()
