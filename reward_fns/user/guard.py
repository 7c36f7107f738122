"""A user's reward function behind a wall: it runs in a child process under a deadline.

Whatever the function does (raise, return nonsense, loop in C code that never lets go of the
interpreter, leave, crash, print) costs its own sample, which fails with one of four codes; the
child (`guard_process.py`) is then ended, if need be, and started again. A call costs about 70 us
beyond the function's own time.

Left out: limits on the child's memory, files or network, for a user's own function is trusted,
only not to be free of faults.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rcot_rl.errors import InputError
from reward_fns.user.guard_process import DIED, TIMEOUT, CallFailed, Child, encode
from reward_fns.user.sources import Source

RAISED = "reward_function_raised"
BAD_RESULT = "reward_function_bad_result"

DEADLINE_S = 10.0
"""What a call has when nothing else is said."""
GRACE_S = 1.0
"""What an async child has, beyond the deadline, to cancel and answer."""

HUNG = "the call of several samples hung"


@dataclass(frozen=True)
class Result:
    """One sample's result; when it failed, `failed` has the reason codes and `says` the story."""

    reward: float
    components: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    says: str = ""


class Guard:
    """A function and the child that it runs in. Safe for threads, which take turns.

    Raises InputError when the function cannot be loaded.
    """

    def __init__(self, source: Source, constants: Mapping[str, Any], deadline_s: float) -> None:
        self.source, self.constants, self.deadline_s = source, dict(constants), deadline_s
        self._lock, self._owner, self._id = threading.Lock(), os.getpid(), 0
        self._child: Child | None = Child(source, constants)
        self.traits = self._child.traits
        self.restarts = 0

    def call(self, samples: Sequence[Sequence[Any]]) -> list[Result]:
        """Results of samples [response, ground truth, row], each within the deadline.

        A batch function gets them in one call, which has the deadline for all; when that call
        fails, each is called alone. Raises InputError for a row that JSON cannot hold.
        """
        if os.getpid() != self._owner:  # a fork: the pipes are the other process's
            self._lock, self._owner, self._child = threading.Lock(), os.getpid(), None
        with self._lock:
            if len(samples) > 1 and (self.traits.batch or self.traits.is_async):
                results = self._ask(self._line(samples), len(samples))
                if self.traits.is_async and not self.traits.batch:
                    again = [r.failed[:1] == [DIED] or r.says == HUNG for r in results]
                else:
                    again = [bool(r.failed) for r in results]
                for i, sample in enumerate(samples):
                    if again[i]:
                        results[i] = self._ask(self._line([sample]), 1)[0]
                return results
            return [self._ask(self._line([sample]), 1)[0] for sample in samples]

    def _line(self, samples: Sequence[Sequence[Any]]) -> bytes:
        self._id += 1
        message = {"id": self._id, "samples": samples, "deadline_s": self.deadline_s}
        return encode(message)

    def _ask(self, line: bytes, count: int) -> list[Result]:
        grace = GRACE_S if self.traits.is_async else 0.0
        try:
            child = self.child()
            answer = json.loads(child.exchange(line, self.deadline_s + grace))
        except CallFailed as error:
            self.end_child()
            says = HUNG if error.code == TIMEOUT and count > 1 else str(error)
            return [Result(0.0, failed=[error.code], says=says)] * count
        except InputError as error:  # it loaded once: its second start is the function's fault
            return [Result(0.0, failed=[DIED], says=str(error))] * count
        return [read(item) for item in answer["results"]]

    def child(self) -> Child:
        """The running child, started if there is none."""
        if self._child is None:
            self._child = Child(self.source, self.constants)
            self.restarts += 1
        return self._child

    def end_child(self) -> None:
        """End the child; the next call starts another."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def close(self) -> None:
        """End the child for now: a later call starts it again."""
        with self._lock:
            self.end_child()


def read(item: Any) -> Result:
    """One result as the child sent it."""
    if isinstance(item, dict):
        code = item["failed"]
        kind = [f"{code}:{item['type']}"] if "type" in item else []
        return Result(0.0, failed=[code, *kind], says=item["says"])
    return Result(*item)
