"""The one exception for input or configuration at fault.

Raised where the cause is known, caught only by the console script (exit status 2, one line for each
fault).
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike


class InputError(Exception):
    """The user's input or configuration is at fault.

    message: what is wrong and what would be right.
    file, line, key: where; each optional, all that are known should be given.
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
        """Faults that were found together with this one."""
        super().__init__(str(self))

    @classmethod
    def of_all(cls, errors: Sequence[InputError]) -> InputError:
        """One error that names every fault of `errors`, which must not be empty."""
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
        # a name may hold a line break, and the message is one line
        where = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in self.file or "")
        if self.line is not None:
            where += f":{self.line}" if where else f"line {self.line}"
        parts = [p for p in (where, self.key, self.message) if p]
        return ": ".join(parts)
