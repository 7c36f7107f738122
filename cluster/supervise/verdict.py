"""Why a stage's process failed, in one paragraph, and whether to start it again.

A failure that repeats itself (the same stage, at the same step, with the same error) is taken for
deterministic: starting again would only repeat it. What kills from outside is told by the exit
status, the kernel's count of out-of-memory kills, and the free space.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rcot_rl.disk import LEAST_FREE, PROBE, Kind, Shortage, named_shortage, shortage
from rcot_rl.files import write_text
from rcot_rl.recipe.supervise import SuperviseSection
from rcot_rl.training.checkpoint_store import room_needed

ATTEMPTS = "attempts.jsonl"
INPUT_FAULT = 2
"""Exit status of our processes for bad input."""
_STATUS = re.compile(r"ended with status (-?\d{1,3})")
_VOLATILE = (
    (re.compile(r"0x[0-9a-fA-F]{4,16}"), "ADDRESS"),
    (re.compile(r"\b[0-9a-f]{16,64}\b"), "ID"),
    (re.compile(r"(?:/[\w.@+-]{1,80}){2,12}"), "PATH"),
    (re.compile(r"\d{1,20}"), "N"),
)


@dataclass(frozen=True)
class Verdict:
    """What became of one attempt."""

    stage: str
    attempt: str
    time: float
    """Seconds since the epoch."""
    step: int
    """Optimizer steps done when it failed."""
    cause: str
    """host, hang, deadline, memory, disk, read-only, input, incomplete, signal or error."""
    error: str
    signature: str
    """The error without what changes from run to run."""
    retry: bool
    text: str
    place: str = ""
    """With cause `disk`: the folder that has no room."""


class History:
    """The failures of one stage, also of earlier commands: RUN/<stage>/attempts.jsonl."""

    def __init__(self, stage: Path, section: SuperviseSection) -> None:
        self.path = stage / ATTEMPTS
        self.section = section
        self._kills = out_of_memory_kills()
        """Before the attempt that is judged next."""

    def failures(self) -> list[dict[str, Any]]:
        """Those of the window, oldest first; a half-written last line does not count."""
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        rows = [json.loads(row) for row in text[: text.rfind("\n") + 1].splitlines()]
        since = time.time() - 60 * self.section.window_minutes
        return [row for row in rows if row["time"] >= since]

    def judge(self, stage: str, message: str, log: Path, step: int, error: str) -> Verdict:
        """The verdict on a failure, noted here and beside the attempt's log.

        message: what the process' watcher saw; error: the last error that its log names.
        """
        before = self.failures()
        kills, self._kills = self._kills, out_of_memory_kills()
        needed = room_needed(log.parent.parent / "checkpoints")
        lack = _lack(log.parent, error, needed)
        cause, says = _cause(message, log, error, lack, self._kills - kills)
        signature = _signature(error if cause == "error" else f"{cause} {error}")
        same = bool(before) and (before[-1]["step"], before[-1]["signature"]) == (step, signature)
        starts = len(before) + 1
        retry, why = self._decide(cause, same, starts, step)
        attempt = log.parent.name
        text = (
            f"{stage} {attempt} {message} after step {step}. {says} "
            f"The last error in its log: {error.rstrip('.') or 'none'}. {why}"
        )
        verdict = Verdict(
            stage,
            attempt,
            time.time(),
            step,
            cause,
            error,
            signature,
            retry,
            " ".join(text.split()),
            str(lack.place) if lack is not None and cause == "disk" else "",
        )
        with contextlib.suppress(OSError):  # where nothing can be written, it is still printed
            self._note(verdict, log.parent)
        return verdict

    def backoff_s(self) -> float:
        """How long to wait before the next start: it doubles with each failure in a row that came
        before another step was done; what fails after progress is not the same fault waiting."""
        steps = [row["step"] for row in self.failures()]
        in_a_row = 0
        while in_a_row < len(steps) and steps[-1 - in_a_row] == steps[-1]:
            in_a_row += 1
        return min(300.0, self.section.backoff_s * 2 ** max(0, in_a_row - 1))

    def _decide(self, cause: str, same: bool, starts: int, step: int) -> tuple[bool, str]:
        if cause == "deadline":
            return False, "Not started again: raise supervise.deadline_hours to go on."
        if cause == "input":
            return False, "Mend what it names, then run the same command."
        if cause == "read-only":
            return False, "Not started again: it does not become writable by waiting."
        if cause == "disk":
            minutes = self.section.disk_wait_minutes
            if not minutes:
                return False, "Not started again: free some space, then run the same command."
            return True, f"Starting again as soon as there is room, within {minutes:g} minutes."
        if same and cause != "host":  # a host is lost from outside, however often
            return False, (
                "The attempt before ended at the same step with the same error: not started again. "
                "Mend the cause, then run the same command; it goes on from the last checkpoint."
            )
        if starts >= self.section.max_attempts:
            return False, (
                f"That was start {starts} of {self.section.max_attempts} "
                f"(supervise.max_attempts) within {self.section.window_minutes:g} minutes: "
                "not started again."
            )
        return True, f"Starting again from the last checkpoint ({starts + 1} of at most "\
            f"{self.section.max_attempts} starts)."  # fmt: skip

    def _note(self, verdict: Verdict, folder: Path) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(verdict)) + "\n")
        write_text(folder / "verdict.json", json.dumps(asdict(verdict), indent=1) + "\n")
        write_text(folder / "verdict.txt", verdict.text + "\n")


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed for memory since it started."""
    try:
        for row in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if row.startswith("oom_kill "):
                return int(row.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def _lack(attempt: Path, error: str, needed: int) -> Shortage | None:
    """What keeps the run from writing, where its attempts lie or its error's paths lead."""
    named = named_shortage(error)
    run = attempt.absolute().parents[1]
    places = [p for p in named[1] if p.is_relative_to(run)] if named else []
    for place in (attempt, *places):
        lack = shortage(place, needed if named else LEAST_FREE, LEAST_FREE if named else PROBE)
        if lack is not None:
            return lack
    return None


_SAYS: dict[Kind, str] = {
    "space": "was full",
    "inodes": "had no inodes left",
    "quota": "was over its quota",
    "read-only": "was read-only",
}


def _named_by(error: str, attempt: Path) -> str | None:
    """What to say of an error that names a shortage which the run's folder does not have (now)."""
    named = named_shortage(error)
    if named is None:
        return None
    kind, paths = named
    run = attempt.absolute().parents[1]
    if "no room for a checkpoint" in error or any(path.is_relative_to(run) for path in paths):
        return f"The run's file system {_SAYS[kind]} and can be written again."
    where = f"{paths[0]}" if paths else "the error names no path, and the run's can be written"
    return f"A file system that is not the run's {_SAYS[kind]}: {where}."


def _cause(
    message: str, log: Path, error: str, lack: Shortage | None, kills: int
) -> tuple[str, str]:
    """lack: what keeps the run from writing; kills: for memory, during the attempt."""
    if "deadline" in message:
        return "deadline", "It ran longer than it may."
    if message.startswith("lost host"):
        return "host", "The next start waits for the hosts that the recipe wants."
    if "hung" in message:
        stacks = log.parent / "stacks"
        return "hang", f"What its processes were doing is in {stacks}."
    if lack is not None:
        return ("disk" if lack.passes else "read-only"), f"{lack.place}: {lack.text}"
    if kills > 0:
        return "memory", "The kernel killed a process for memory during this attempt."
    found = _STATUS.search(message)
    status = int(found[1]) if found else 1
    if status == INPUT_FAULT:
        return "input", "What it was given is at fault."
    elsewhere = _named_by(error, log.parent)
    if elsewhere is not None:
        return "error", elsewhere
    if status == 0:
        return "incomplete", "A stage is done when the checkpoint of its last step is sealed."
    number = -status if status < 0 else status - 128  # Popen's way, and a shell's
    if number > 0:
        name = signal.Signals(number).name if number in set(signal.Signals) else "?"
        return "signal", f"Signal {number} ({name}) ended it."
    return "error", "It ended by itself."


def _signature(error: str) -> str:
    for pattern, word in _VOLATILE:
        error = pattern.sub(word, error)
    return error[:400]
