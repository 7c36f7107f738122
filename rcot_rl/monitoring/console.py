"""Terminal output of a run: stages, steps and progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any


class Console:
    """Prints lines with the time since the start to standard error.

    On a terminal, progress is rewritten in place; in a log, it has a line per minute. Both name the
    rate and the estimated time of arrival (ETA) once they can be measured.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._tty = sys.stderr.isatty()
        self._open = False
        self._shown: dict[str, float] = {}
        self._first: dict[str, tuple[float, int]] = {}
        """Work -> time and number of items at its first report."""
        self._ended: dict[str, str] = {}

    def line(self, text: str) -> None:
        """Print one line."""
        self._close()
        print(f"[{self._clock()}] {text}", file=sys.stderr, flush=True)

    def text(self, text: str) -> None:
        """Print lines without the time."""
        self._close()
        print(text.strip("\n"), file=sys.stderr, flush=True)

    def stage(self, name: str) -> None:
        """Announce the start of a stage."""
        self.line(f"== {name}")

    def step(self, stage: str, metrics: dict[str, Any], total: int) -> None:
        """Show the metrics of one optimizer step; in a log, each step has a line."""
        parts = [f"{stage} step {metrics['step']}/{total}"]
        for key, label, digits in (
            ("train/loss", "loss", 3),
            ("reward/mean", "reward", 2),
            ("group/zero_variance_fraction", "zero-variance", 2),
            ("response_length/mean", "length", 0),
            ("actor/kl_loss", "KL", 4),
            ("timing_s/step", "s/step", 1),
        ):
            if key in metrics:
                parts.append(f"{label} {metrics[key]:.{digits}f}")
        self._progress("  ".join(parts), stage, last=metrics["step"] >= total, keep=True)

    def progress(self, work: str, done: int, total: int) -> None:
        """Show how many items of some work are done, with rate and ETA."""
        self._progress(f"{work} {done}/{total}{self._rate(work, done, total)}", work, done >= total)

    def event(self, stage: str, event: Mapping[str, Any]) -> None:
        """Show an event of a stage's child process (`rcot_rl.events`)."""
        kind, work = event.get("event"), event.get("what")
        if kind == "progress" and "done" in event:
            done, total = event["done"], event["total"]
            label = stage if work == stage else f"{stage}: {work}"
            rate = f"  {event['rate']}" if event.get("rate") else self._rate(label, done, total)
            self._progress(f"{label} {done}/{total}{rate}", label, last=done >= total)
        elif kind == "heldout":
            means = ", ".join(f"{w} {event[w]:.2f}" for w in ("sampled", "greedy") if w in event)
            self.line(f"{stage}: held-out reward of {work}: {means}")
        elif "message" in event:
            self.line(f"{stage}: {event['message']}")

    def _progress(self, text: str, key: str, last: bool, keep: bool = False) -> None:
        """Show progress.

        Args:
            text: The line.
            key: The work; in a log, each has its own minute.
            last: The work is done; the line is kept.
            keep: Print each line in a log.
        """
        if self._tty:
            print(f"\r\033[K[{self._clock()}] {text}", end="", file=sys.stderr, flush=True)
            self._open = True
            if last:
                self._close()
            return
        now = time.monotonic()
        if last and self._ended.get(key) == text:
            return  # the same end was already printed
        if last:
            self._ended[key] = text
        if last or keep or now - self._shown.get(key, -1e9) >= 60:
            self._shown[key] = now
            self.line(text)

    def _rate(self, work: str, done: int, total: int) -> str:
        """Return the rate and the ETA; empty until a second has passed and at the end."""
        now = time.monotonic()
        if done <= self._first.get(work, (0.0, done))[1]:  # the first report, or work that restarts
            self._first[work] = now, done
        began, before = self._first[work]
        seconds = now - began
        if seconds < 1 or done >= total:
            return ""
        rate = (done - before) / seconds
        minutes, rest = divmod(round((total - done) / rate), 60)
        return f"  {rate:.3g}/s, ETA {minutes:02d}:{rest:02d}"

    def _close(self) -> None:
        if self._open:
            print(file=sys.stderr)
            self._open = False

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"{minutes:02d}:{seconds:02d}"
