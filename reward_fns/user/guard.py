"""Run a user's reward function in a child process, with a deadline.

A failure of any kind (an exception, an invalid result, C code that never releases the interpreter,
an exit, a crash) costs only its own sample, which fails with one of four codes. If needed, the
child (`guard_process.py`) is killed and restarted. A call adds about 70 us to the function's own
time.

Not in scope: limits on the child's memory, files or network. The function is trusted, but not
assumed to be free of bugs.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rcot_rl.errors import InputError
from reward_fns.user.guard_process import CallFailed, Child, encode
from reward_fns.user.sources import UserSource
from reward_fns.user.user_result import DIED, TIMEOUT

DEADLINE_S = 10.0
"""Default deadline of a call."""
GRACE_S = 1.0
"""Extra time an async child has to cancel a call and answer."""

HUNG = "the call with several samples hung"


@dataclass(frozen=True)
class Result:
    """Result of one sample."""

    reward: float
    components: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Reason codes of the failure; empty on success."""
    message: str = ""
    """What went wrong."""


class Guard:
    """A function and its child process. Thread-safe; calls are serialized.

    Raises:
        InputError: The function cannot be loaded.
    """

    def __init__(self, source: UserSource, constants: Mapping[str, Any], deadline_s: float) -> None:
        self.source, self.constants, self.deadline_s = source, dict(constants), deadline_s
        self._lock, self._owner, self._id = threading.Lock(), os.getpid(), 0
        self._child: Child | None = Child(source, constants)
        self.traits = self._child.traits
        self.restarts = 0

    def call(self, samples: Sequence[Sequence[Any]]) -> list[Result]:
        """Call the function for samples [response, ground truth, row].

        Each sample has the deadline. A batch function gets all samples in one call with one
        deadline; if that call fails, each sample is called alone. Raises InputError.
        """
        if os.getpid() != self._owner:  # after a fork: the pipes belong to the parent
            self._lock, self._owner, self._child = threading.Lock(), os.getpid(), None
        with self._lock:
            if len(samples) > 1 and (self.traits.batch or self.traits.is_async):
                results = self._ask(self._line(samples), len(samples))
                if self.traits.is_async and not self.traits.batch:
                    retry = [r.failed[:1] == [DIED] or r.message == HUNG for r in results]
                else:
                    retry = [bool(r.failed) for r in results]
                for i, sample in enumerate(samples):
                    if retry[i]:
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
            message = HUNG if error.code == TIMEOUT and count > 1 else str(error)
            return [Result(0.0, failed=[error.code], message=message)] * count
        except InputError as error:  # it loaded before, so a failed restart is the function's fault
            return [Result(0.0, failed=[DIED], message=str(error))] * count
        return [to_result(item) for item in answer["results"]]

    def child(self) -> Child:
        """Return the running child; start one if needed."""
        if self._child is None:
            self._child = Child(self.source, self.constants)
            self.restarts += 1
        return self._child

    def end_child(self) -> None:
        """End the child; the next call starts a new one."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def close(self) -> None:
        """End the child. A later call starts a new one."""
        with self._lock:
            self.end_child()


def to_result(item: Any) -> Result:
    """Convert one result from the child's JSON."""
    if isinstance(item, dict):
        code = item["failed"]
        kind = [f"{code}:{item['type']}"] if "type" in item else []
        return Result(0.0, failed=[code, *kind], message=item["message"])
    return Result(*item)
