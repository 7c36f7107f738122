"""The exception for invalid input or configuration.

It is raised where the cause is known. The console script catches it, prints one line per fault and
exits with status 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike


class InputError(Exception):
    """The user's input or configuration is invalid.

    Args:
        message: What is wrong and what to do about it.
        file: The file or folder, if known.
        line: The line in it, if known.
        key: The recipe key, option or row, if known.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | PathLike[str] | None = None,
        line: int | None = None,
        key: str | None = None,
    ) -> None:
        self.message = message
        self.file = str(file) if file is not None else None
        self.line = line
        self.key = key
        self.others: tuple[InputError, ...] = ()
        """Faults found together with this one."""
        super().__init__(str(self))

    @classmethod
    def of_all(cls, errors: Sequence[InputError]) -> InputError:
        """Return one error that names every fault of `errors`; `errors` must not be empty."""
        first = errors[0]
        first.others = (*first.others, *errors[1:])
        first.args = (str(first),)
        return first

    @property
    def faults(self) -> list[str]:
        """One line for each fault."""
        return [self._line(), *(line for other in self.others for line in other.faults)]

    def __str__(self) -> str:
        return "\n".join(self.faults)

    def _line(self) -> str:
        # a file name may contain a line break, but the message is one line
        where = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in self.file or "")
        if self.line is not None:
            where += f":{self.line}" if where else f"line {self.line}"
        parts = [p for p in (where, self.key, self.message) if p]
        return ": ".join(parts)
