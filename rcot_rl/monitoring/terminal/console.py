"""Terminal output of a run: stages, steps and progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size

from rcot_rl.monitoring.terminal.pace import (
    WINDOW,
    clock_text,
    left_text,
    pace_text,
    seconds_per_step,
)
from rcot_rl.monitoring.terminal.status_writer import StatusWriter
from rcot_rl.system.lines import fold, width_of

STEP_VALUES = (
    ("train/loss", "loss", 3),
    ("reward/mean", "reward", 2),
    ("actor/kl_loss", "KL", 4),
    ("response_length/mean", "length", 0),
    ("group/zero_variance_fraction", "zero-variance", 2),
)
"""Metric, its name and its digits in the line of a step, the most important first."""


class Console:
    """Prints lines with the time since the start to standard error.

    On a terminal, one live line shows the step or the item in progress, with the rate, the time
    left and the date of the end. In a log, each step has a line, other progress has one a minute.
    Lines are wrapped at words, at 80 columns in a log; what does not fit in a step's line is left
    out (metrics.jsonl has it).

    Args:
        stages: All stages of the command, in order.
    """

    def __init__(self, stages: Sequence[str] = ()) -> None:
        self.status: StatusWriter | None = None
        """Told what is printed, if set."""

        self._stages = list(stages)
        self._stage = ""
        self._started = time.monotonic()
        self._tty = sys.stderr.isatty()
        self._live = False
        self._shown: dict[str, float] = {}
        self._first: dict[str, tuple[float, int]] = {}
        """Work -> time and number of items at its first report."""
        self._ended: dict[str, str] = {}
        self._steps: list[tuple[int, float]] = []
        """Number and end of the last steps of the stage."""

    def line(self, text: str) -> None:
        """Print a message. Each of its lines is wrapped."""
        self._update(message=" ".join(text.split()))
        self._print(text)

    def text(self, text: str) -> None:
        """Print lines, such as a table, without the time."""
        self._close()
        for row in text.strip("\n").splitlines():
            indent = row[: len(row) - len(row.lstrip())]
            lines = fold(row.lstrip(), width_of(sys.stderr), indent, indent)
            print("\n".join(lines), file=sys.stderr, flush=True)

    def stage(self, name: str) -> None:
        """Announce the start of a stage."""
        self._stage, self._steps = name, []
        self._update(
            stage=name,
            stage_started=time.time(),
            step=0,
            total_steps=0,
            seconds_per_step=None,
            work="",
            work_done=0,
            work_total=0,
            work_started=None,
        )
        position = self._position()
        self.line(f"== {name}, stage {position.replace('/', ' of ')}" if position else f"== {name}")

    def step(self, stage: str, metrics: Mapping[str, Any], total: int) -> None:
        """Show the metrics of one optimizer step; in a log, each step has one line."""
        number = metrics["step"]
        self._steps = [one for one in self._steps if one[0] < number][-WINDOW:]
        self._steps.append((number, metrics.get("time") or time.time()))
        pace = seconds_per_step(self._steps)
        self._update(step=number, total_steps=total, seconds_per_step=pace, work="")
        values = [f"{n} {metrics[k]:.{d}f}" for k, n, d in STEP_VALUES if k in metrics]
        left = left_text((total - number) * pace) if pace and number < total else ""
        taken = [pace_text(pace)] if pace else []
        label = f"{stage} step {number}/{total}"
        if self._tty and number < total:
            progress = ", ".join([label, *(f"{t}/step" for t in taken), *([left] if left else [])])
            self._show_live("  ".join([progress, *values]))
        else:
            self._print(self._fitted(label, [*values[:3], *taken, *values[3:]]))
            if left and (number % 10 == 0 or len(self._steps) == 2):
                self._print(f"{stage}: {left}")

    def progress(self, work: str, done: int, total: int) -> None:
        """Show how many items of some work are done, with rate and time left."""
        self._progress(work, done, total, *self._rate(work, done, total))

    def event(self, stage: str, event: Mapping[str, Any]) -> None:
        """Show an event of a stage's child process (`rcot_rl.events`)."""
        kind, work = event.get("event"), event.get("what")
        if kind == "progress" and "done" in event:
            done, total = event["done"], event["total"]
            label = stage if work == stage else f"{stage}: {work}"
            rate, left = self._rate(label, done, total)
            self._progress(label, done, total, event.get("rate") or rate, left)
        elif kind == "heldout":
            means = ", ".join(f"{w} {event[w]:.2f}" for w in ("sampled", "greedy") if w in event)
            self.line(f"{stage}: held-out {work}: {means}")
        elif "message" in event:
            self.line(f"{stage}: {event['message']}")

    def _progress(self, work: str, done: int, total: int, rate: str, left: str) -> None:
        """Show progress; in a log at its start, once a minute, and at its end.

        Args:
            rate: Items per second or another measure; empty if unknown.
            left: Time left and date of the end; empty if unknown.
        """
        now, last = time.monotonic(), done >= total
        self._update(work=work, work_done=done, work_total=total)
        facts = ", ".join(fact for fact in (rate, left) if fact)
        text = f"{work} {done}/{total}" + (f"  {facts}" if facts else "")
        if last and self._ended.get(work) == text:
            return  # the same end was already printed
        if last:
            self._ended[work] = text
        if self._tty and not last:
            self._show_live(text)
        elif last or now - self._shown.get(work, -1e9) >= 60:
            self._shown[work] = now
            self._print(text)

    def _rate(self, work: str, done: int, total: int) -> tuple[str, str]:
        """Return the rate and the time left; empty until a second has passed and at the end."""
        now = time.monotonic()
        if done <= self._first.get(work, (0.0, done))[1]:  # the first report, or work that restarts
            self._first[work] = now, done
            self._update(work_started=time.time())
        began, before = self._first[work]
        seconds = now - began
        if seconds < 1 or done >= total:
            return "", ""
        rate = (done - before) / seconds
        return f"{rate:.3g}/s", left_text((total - done) / rate)

    def _show_live(self, text: str) -> None:
        """Rewrite the live line."""
        shown = " ".join(p for p in (self._position(), text) if p)
        room = width_of(sys.stderr) - 1  # a full line would wrap
        shown = shown if cell_len(shown) <= room else set_cell_size(shown, room - 1) + "…"
        print(f"\r\033[K{shown}", end="", file=sys.stderr, flush=True)
        self._live = True

    def _print(self, text: str) -> None:
        self._close()
        start = f"[{clock_text(time.monotonic() - self._started)}] "
        for number, row in enumerate(text.splitlines() or [""]):
            first = start if not number else " " * len(start)
            for line in fold(row, width_of(sys.stderr), first, " " * len(start)):
                print(line, file=sys.stderr, flush=True)

    def _fitted(self, label: str, parts: Sequence[str]) -> str:
        """Return the label and as many parts as fit into a line."""
        room = width_of(sys.stderr) - len(f"[{clock_text(time.monotonic() - self._started)}] ")
        text = label
        for part in parts:
            if len(text) + 2 + len(part) > room:
                break
            text += f"  {part}"
        return text

    def _position(self) -> str:
        """Return the stage's number and the number of stages, such as `3/7`."""
        if self._stage not in self._stages:
            return ""
        return f"{self._stages.index(self._stage) + 1}/{len(self._stages)}"

    def _close(self) -> None:
        """End the live line; its text has been replaced or is no longer true."""
        if self._live:
            print("\r\033[K", end="", file=sys.stderr)
            self._live = False

    def _update(self, **values: Any) -> None:
        if self.status is not None:
            self.status.update(**values)
