"""What a run says on the terminal: stages, steps, progress; one line each, flushed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class Console:
    """Lines on standard error, with the minutes since the start; rewritten in place on a tty."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._tty = sys.stderr.isatty()
        self._open = False
        self._shown: dict[str, float] = {}
        self._ended: dict[str, str] = {}

    def line(self, text: str) -> None:
        """A line that stays."""
        self._close()
        print(f"[{self._clock()}] {text}", file=sys.stderr, flush=True)

    def text(self, text: str) -> None:
        """Lines that stay, as they are."""
        self._close()
        print(text.strip("\n"), file=sys.stderr, flush=True)

    def stage(self, name: str) -> None:
        """The start of a stage."""
        self.line(f"== {name}")

    def step(self, stage: str, metrics: dict[str, Any], total: int) -> None:
        """One optimizer step; each has a line, however many arrive together."""
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
        self._passing("  ".join(parts), stage, last=metrics["step"] >= total, keep=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """Work in items."""
        self._passing(f"{what} {done}/{total}", what, last=done >= total)

    def event(self, stage: str, text: str) -> None:
        """A JSON event that a stage's process printed, in words."""
        try:
            event = json.loads(text)
        except json.JSONDecodeError:
            return
        if not isinstance(event, dict):
            return
        kind, what = event.get("event"), event.get("what")
        if kind in ("predict", "ask") and "done" in event:
            rate = f"  {event['rate']}" if event.get("rate") else ""
            done, total = event["done"], event["total"]
            label = stage if what == stage else f"{stage}: {what}"
            self._passing(f"{label} {done}/{total}{rate}", label, last=done >= total)
        elif kind == "heldout":
            means = ", ".join(f"{w} {event[w]:.2f}" for w in ("sampled", "greedy") if w in event)
            self.line(f"{stage}: held-out reward of {what}: {means}")
        elif "message" in event:
            self.line(f"{stage}: {event['message']}")

    def _passing(self, text: str, key: str, last: bool, keep: bool = False) -> None:
        """A line that the next replaces on a terminal; elsewhere, one every few seconds, or all of
        them if `keep`."""
        if self._tty:
            print(f"\r\033[K[{self._clock()}] {text}", end="", file=sys.stderr, flush=True)
            self._open = True
            if last:
                self._close()
            return
        now = time.monotonic()
        if last and self._ended.get(key) == text:
            return  # the end of the work, told twice
        if last:
            self._ended[key] = text
        if last or keep or now - self._shown.get(key, -1e9) >= 10:
            self._shown[key] = now
            self.line(text)

    def _close(self) -> None:
        if self._open:
            print(file=sys.stderr)
            self._open = False

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"{minutes:02d}:{seconds:02d}"


class EventReader:
    """Shows a process' progress lines, which it prints among vLLM's own."""

    def __init__(self, log: Path, console: Console, stage: str = "predict") -> None:
        self._log, self._console, self._stage = log, console, stage
        self._offset = log.stat().st_size if log.is_file() else 0

    def poll(self) -> None:
        if not self._log.is_file():
            return
        with self._log.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for raw in whole.splitlines():
            if raw.startswith(b"RCOT "):
                self._console.event(self._stage, raw[5:].decode("utf-8", "replace"))
