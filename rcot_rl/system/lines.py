"""Lines that fit into a terminal."""

from __future__ import annotations

import os
import textwrap
from typing import TextIO

LOG_WIDTH = 80
"""Columns of a line where there is no terminal."""


def width_of(stream: TextIO) -> int:
    """Return the columns of the terminal that `stream` writes to; LOG_WIDTH if it is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or LOG_WIDTH
    except (OSError, ValueError):
        return LOG_WIDTH


def fold(text: str, width: int, first: str = "", indent: str = "") -> list[str]:
    """Return `text` in lines of at most `width` characters.

    A word that is longer than a line, such as a path, stays whole. Text that fits is kept as it is,
    with its blanks.

    Args:
        first: Start of the first line.
        indent: Start of the other lines.
    """
    if len(first) + len(text) <= width:
        return [first + text]
    return textwrap.wrap(
        text.strip(),
        width,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def wrapped(text: str, stream: TextIO) -> str:
    """Return `text` folded on a terminal, and unchanged elsewhere: scripts read whole lines."""
    if not stream.isatty():
        return text
    width = width_of(stream)
    return "\n".join(line for row in text.split("\n") for line in fold(row, width, "", "  "))
