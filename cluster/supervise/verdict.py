"""Judge why a stage's process failed, and whether to retry it.

A failure that repeats (same stage, same step, same error) is treated as deterministic and is not
retried. Causes from outside are recognized by the exit status, the kernel's count of out-of-memory
kills, and the free disk space.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rcot_rl.recipe.supervise_section import SuperviseSection
from rcot_rl.system.disk import LEAST_FREE, PROBE, Kind, Shortage, named_shortage, shortage
from rcot_rl.system.files import write_text
from rcot_rl.training.checkpoint_store import room_needed

ATTEMPTS = "attempts.jsonl"
INPUT_FAULT = 2
"""Exit status of this project's processes if the input is at fault."""

FailureCause = Literal[
    "host",
    "hang",
    "deadline",
    "memory",
    "disk",
    "read-only",
    "input",
    "incomplete",
    "signal",
    "error",
]

_STATUS = re.compile(r"ended with status (-?\d{1,3})")
_VOLATILE = (
    (re.compile(r"0x[0-9a-fA-F]{4,16}"), "ADDRESS"),
    (re.compile(r"\b[0-9a-f]{16,64}\b"), "ID"),
    (re.compile(r"(?:/[\w.@+-]{1,80}){2,12}"), "PATH"),
    (re.compile(r"\d{1,20}"), "N"),
)
"""What differs between two runs of one error, and its replacement in a signature."""


@dataclass(frozen=True)
class FailureVerdict:
    """Why one attempt failed, and what is done about it. One row of attempts.jsonl."""

    stage: str
    attempt: str
    time: float
    """Seconds since the epoch."""
    step: int
    """Optimizer steps done before the failure."""
    cause: FailureCause
    error: str
    signature: str
    """The error without the parts that change from run to run."""
    retry: bool
    text: str
    """The verdict in one paragraph."""
    sentences: tuple[str, ...] = ()
    """The same for people: what ended and when, why, the last error, what happens next."""
    place: str = ""
    """With cause `disk`: the folder that has no room."""


class FailureHistory:
    """The failures of one stage, also of earlier commands: RUN/<stage>/attempts.jsonl."""

    def __init__(self, stage: Path, section: SuperviseSection) -> None:
        self.stage = stage
        self.path = stage / ATTEMPTS
        self.section = section
        self._kills = out_of_memory_kills()
        """The kernel's count before the next attempt."""

    def failures(self) -> list[dict[str, Any]]:
        """Return the failures within `window_minutes`, oldest first, whole lines only."""
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        rows = [json.loads(row) for row in text[: text.rfind("\n") + 1].splitlines()]
        since = time.time() - 60 * self.section.window_minutes
        return [row for row in rows if row["time"] >= since]

    def judge(self, message: str, log: Path, step: int, error: str) -> FailureVerdict:
        """Judge a failed attempt, and record the verdict here and next to the attempt's log.

        Args:
            message: What the supervisor observed, such as `ended with status 1`.
        """
        before = self.failures()
        kills, self._kills = self._kills, out_of_memory_kills()
        lack = _lack(log.parent, error, room_needed(self.stage / "checkpoints"))
        cause, explanation = _cause(message, log, error, lack, self._kills - kills)
        signature = _signature(error if cause == "error" else f"{cause} {error}")
        same = bool(before) and (before[-1]["step"], before[-1]["signature"]) == (step, signature)
        retry, decision = self._decide(cause, same, len(before) + 1)
        sentences = tuple(
            " ".join(sentence.split())
            for sentence in (
                f"{self.stage.name} {log.parent.name} {message} after step {step}.",
                explanation,
                f"The last error in its log: {error.rstrip('.') or 'none'}.",
                decision,
            )
        )
        verdict = FailureVerdict(
            stage=self.stage.name,
            attempt=log.parent.name,
            time=time.time(),
            step=step,
            cause=cause,
            error=error,
            signature=signature,
            retry=retry,
            text=" ".join(sentences),
            sentences=sentences,
            place=str(lack.place) if lack is not None and cause == "disk" else "",
        )
        with contextlib.suppress(OSError):  # a full disk must not hide the verdict
            self._record(verdict, log.parent)
        return verdict

    def backoff_s(self) -> float:
        """Return the seconds to wait; they double with each failure at the same step, up to 300."""
        steps = [row["step"] for row in self.failures()]
        in_a_row = 0
        while in_a_row < len(steps) and steps[-1 - in_a_row] == steps[-1]:
            in_a_row += 1
        return min(300.0, self.section.backoff_s * 2 ** max(0, in_a_row - 1))

    def _decide(self, cause: FailureCause, same: bool, starts: int) -> tuple[bool, str]:
        """Return whether to retry, and a sentence that says so.

        Args:
            same: True if the failure before had the same step and error.
            starts: Number of starts within the window, this one included.
        """
        if cause == "deadline":
            return False, "Not retried: raise supervise.deadline_hours to continue."
        if cause == "input":
            return False, "Not retried: fix the input, then rerun the same command."
        if cause == "read-only":
            return False, "Not retried: waiting does not make it writable."
        if cause == "disk":
            minutes = self.section.disk_wait_minutes
            if not minutes:
                return False, "Not retried: free some space, then rerun the same command."
            return True, f"Retrying as soon as there is room, within {minutes:g} minutes."
        if same and cause != "host":  # losing hosts repeatedly is not deterministic
            return False, (
                "Not retried: the attempt before ended at the same step with the same error. "
                "Fix the cause, then rerun the same command to resume from the last checkpoint."
            )
        most = self.section.max_attempts
        if starts >= most:
            return False, (
                f"Not retried: that was start {starts} of {most} (supervise.max_attempts) within "
                f"{self.section.window_minutes:g} minutes."
            )
        return True, f"Retrying from the last checkpoint ({starts + 1} of at most {most} starts)."

    def _record(self, verdict: FailureVerdict, attempt: Path) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(verdict)) + "\n")
        write_text(attempt / "verdict.json", json.dumps(asdict(verdict), indent=1) + "\n")
        write_text(attempt / "verdict.txt", verdict.text + "\n")


def out_of_memory_kills() -> int:
    """Return how many processes the kernel has killed for memory since boot; 0 if unknown."""
    try:
        for row in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if row.startswith("oom_kill "):
                return int(row.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def _lack(attempt: Path, error: str, needed: int) -> Shortage | None:
    """Return what prevents writing in the attempt's folder or at the error's paths below RUN.

    Args:
        attempt: RUN/<stage>/attempt-K.
        needed: Bytes of a checkpoint; required only if the error names a shortage.
    """
    named = named_shortage(error)
    run = attempt.absolute().parents[1]
    places = [p for p in named[1] if p.is_relative_to(run)] if named else []
    for place in (attempt, *places):
        lack = shortage(place, needed if named else LEAST_FREE, LEAST_FREE if named else PROBE)
        if lack is not None:
            return lack
    return None


_SHORTAGE_TEXTS: dict[Kind, str] = {
    "space": "was full",
    "inodes": "had no inodes left",
    "quota": "was over its quota",
    "read-only": "was read-only",
}


def _named_by(error: str, attempt: Path) -> str | None:
    """Return a sentence on an error that names a shortage which RUN does not have (any more)."""
    named = named_shortage(error)
    if named is None:
        return None
    kind, paths = named
    run = attempt.absolute().parents[1]
    if "no room for a checkpoint" in error or any(path.is_relative_to(run) for path in paths):
        return f"The run's file system {_SHORTAGE_TEXTS[kind]} and can be written again."
    where = f"{paths[0]}" if paths else "the error names no path, and the run's can be written"
    return f"A file system that is not the run's {_SHORTAGE_TEXTS[kind]}: {where}."


def _cause(
    message: str, log: Path, error: str, lack: Shortage | None, kills: int
) -> tuple[FailureCause, str]:
    """Return the cause of a failure, and a sentence that explains it.

    Args:
        kills: Processes killed for memory during the attempt.
    """
    if "deadline" in message:
        return "deadline", "It ran longer than supervise.deadline_hours."
    if message.startswith("lost host"):
        return "host", "The next start waits for as many hosts as the recipe needs."
    if "hung" in message:
        return "hang", f"The stacks of its processes are in {log.parent / 'stacks'}."
    if lack is not None:
        return ("disk" if lack.passes else "read-only"), f"{lack.place}: {lack.text}"
    if kills > 0:
        return "memory", "The kernel killed a process for memory during this attempt."
    match = _STATUS.search(message)
    status = int(match[1]) if match else 1
    if status == INPUT_FAULT:
        return "input", "Its input is at fault."
    elsewhere = _named_by(error, log.parent)
    if elsewhere is not None:
        return "error", elsewhere
    if status == 0:
        return "incomplete", "A stage is done when the checkpoint of its last step is sealed."
    number = (
        -status if status < 0 else status - 128
    )  # negative: from Popen; above 128: from a shell
    if number > 0:
        name = signal.Signals(number).name if number in set(signal.Signals) else "?"
        return "signal", f"Signal {number} ({name}) ended it."
    return "error", "It ended by itself."


def _signature(error: str) -> str:
    for pattern, word in _VOLATILE:
        error = pattern.sub(word, error)
    return error[:400]
