"""`rcot watch`: a run in the terminal, in progress or finished.

A frame is a list of lines that fit the terminal. Text of the run (names, errors, links) is
untrusted: characters that a terminal would interpret are replaced.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.text import Text

from rcot_rl.monitoring.run_files.run_reader import StageView
from rcot_rl.monitoring.terminal.pace import (
    duration_text,
    left_text,
    moment_text,
    pace_text,
)
from rcot_rl.monitoring.terminal.watched_run import MetricsTail, WatchedRun
from rcot_rl.stats.json_values import is_number
from rcot_rl.system.lines import fold

BARS = " ▁▂▃▄▅▆▇█"
ASCII_BARS = " .:-=+*#@"
MARKS = {"done": "✓", "running": "▶", "stopped": "✗", "pending": "·"}
ASCII_MARKS = {"done": "+", "running": ">", "stopped": "x", "pending": "."}
STYLES = {"done": "green", "running": "bold cyan", "stopped": "bold red", "pending": "dim"}

ROWS = (
    ("train/loss", "loss", 3),
    ("group/zero_variance_fraction", "zero variance", 2),
    ("response_length/mean", "length", 0),
    ("actor/kl_loss", "KL", 4),
    ("timing_s/step", "s/step", 1),
)
"""Metric, name and digits of the curves below the rewards."""


_GPU_MEMORY = re.compile(r"gpu/.{1,200}/memory_gib/max")


@dataclass(frozen=True)
class Screen:
    """Where a frame is drawn. `height` is None for text that scrolls."""

    width: int
    height: int | None
    unicode: bool
    encoding: str = "utf-8"

    def text(self, parts: Sequence[tuple[object, str]]) -> Text:
        """Return one line of (text, style) that is cut off at the width."""
        line, room = Text(no_wrap=True), self.width
        for part, style in parts:
            shown = self._printable(str(part))
            if cell_len(shown) > room:
                shown = set_cell_size(shown, max(0, room - 1)) + ("…" if self.unicode else "~")
            line.append(shown, style=style)
            room -= cell_len(shown)
            if room <= 0:
                break
        return line

    def _printable(self, text: str) -> str:
        shown = "".join(c if c.isprintable() else "?" if ord(c) > 31 else " " for c in text)
        if not self.unicode:
            shown = shown.replace("→", "->").replace("…", "~")
        return shown.encode(self.encoding, "replace").decode(self.encoding)


def watch(root: Path, *, once: bool = False, every: float = 2.0) -> None:
    """Show a run until it ends, or once if it has ended or if the output is no terminal.

    Args:
        root: The run folder; nothing is written to it.
        once: Show one frame.
        every: Seconds between two looks at the folder.

    Raises:
        InputError: There is no such run.
    """
    run = WatchedRun(root)
    console = RichConsole(highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    if not live and "COLUMNS" not in os.environ:
        console.width = 80
    run.poll()
    if live and not once and not run.is_finished:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(run, console, every)
    for line in frame(run, _screen(console, None)):
        console.print(line, no_wrap=True, overflow="crop", crop=False)


def _follow(run: WatchedRun, console: RichConsole, every: float) -> None:
    """Redraw the screen until the run ends or the user quits."""
    with _keys() as pressed, Live(screen=True, auto_refresh=False, console=console) as live:
        while True:
            size = console.size
            screen = _screen(console, size.height)
            live.update(Group(*frame(run, screen)), refresh=True)
            if run.is_finished:
                return
            deadline = time.monotonic() + every
            while (left := deadline - time.monotonic()) > 0 and console.size == size:
                if pressed(min(left, 0.5)):
                    return
            if console.size == size:
                run.poll()


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Yield a function that waits some seconds, and returns True at once if `q` is pressed."""
    if not sys.stdin.isatty():

        def waited(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield waited
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> bool:
        if not select.select([descriptor], [], [], seconds)[0]:
            return False
        data = os.read(descriptor, 1024)
        return not data or b"q" in data.lower()  # empty: the terminal is gone

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _screen(console: RichConsole, height: int | None) -> Screen:
    encoding = console.encoding or "ascii"
    return Screen(max(20, console.width), height, encoding.startswith("utf"), encoding)


def frame(run: WatchedRun, screen: Screen) -> list[Text]:
    """Return the lines of a frame, at most `screen.height` of them.

    If a screen is too low, curves of other stages go first, then finished stages share a line.
    """
    lines: list[Text] = []
    for level in range(4):
        lines = _frame(run, screen, level)
        if screen.height is None or len(lines) <= screen.height:
            return lines
    return lines[: screen.height]


def _frame(run: WatchedRun, screen: Screen, level: int) -> list[Text]:
    """Return a frame without regard to the height.

    Args:
        level: 0: everything; 1: curves of one stage; 2: finished stages in one line; 3: no empty
            lines.
    """
    sections = [
        [_title(run, screen)],
        _verdict_lines(run, screen),
        _stage_lines(run, screen, compact=level >= 2),
        _curve_sections(run, screen, level),
        _result_lines(run, screen),
        _trouble_lines(run, screen),
        _place_lines(run, screen),
    ]
    gap = [screen.text([])] if level < 3 else []
    lines: list[Text] = []
    for section in sections:
        if section:
            lines += [*(gap if lines else []), *section]
    return lines


def _title(run: WatchedRun, screen: Screen) -> Text:
    status = run.status
    parts: list[tuple[object, str]] = [(run.reader.name, "bold"), ("  ", "")]
    if status is None:
        done = sum(stage.state == "done" for stage in run.stages)
        state = f"{done} of {len(run.stages)} stages done"
        parts.append((state, "green" if done == len(run.stages) else "yellow"))
    elif status.is_running:
        spent = duration_text(time.time() - status.started)
        parts += [("running", "bold cyan"), (f" for {spent} on {status.host}", "")]
    elif status.state == "running":
        parts += [
            ("no sign of life", "bold red"),
            (f" since {moment_text(status.updated)} from {status.host}; killed?", ""),
        ]
    else:
        style = {"done": "bold green", "interrupted": "bold yellow"}.get(status.state, "bold red")
        spent = duration_text(status.updated - status.started)
        parts += [
            (status.state, style),
            (f" {moment_text(status.updated)}, after {spent} on {status.host}", ""),
        ]
    return screen.text(parts)


def _verdict_lines(run: WatchedRun, screen: Screen) -> list[Text]:
    """Return what the run's report says first; nothing while the run is in progress."""
    verdict = run.verdict
    if verdict is None:
        return []
    rows = fold(verdict.headline, screen.width)
    return [screen.text([(row, "bold")]) for row in rows]


def _stage_lines(run: WatchedRun, screen: Screen, compact: bool) -> list[Text]:
    marks = MARKS if screen.unicode else ASCII_MARKS
    width = min(24, max((cell_len(stage.name) for stage in run.stages), default=0))
    lines = []
    done = [stage for stage in run.stages if stage.state == "done"]
    waiting = [stage for stage in run.stages if stage.state == "pending"]
    if compact and done:
        minutes = duration_text(60 * sum(_minutes(stage) for stage in done))
        names = ", ".join(stage.name for stage in done)
        lines.append(
            screen.text([(f"{marks['done']} ", "green"), (f"{names} done, {minutes}", "")])
        )
    for stage in run.stages:
        if compact and (stage in done or stage in waiting):
            continue
        name = set_cell_size(stage.name, width)
        lines.append(
            screen.text(
                [
                    (f"{marks[stage.state]} {name}  ", STYLES[stage.state]),
                    (f"{stage.state:<8}", STYLES[stage.state]),
                    (f" {_stage_note(run, stage)}", ""),
                ]
            )
        )
    if compact and waiting:
        names = ", ".join(stage.name for stage in waiting)
        lines.append(screen.text([(f"{marks['pending']} {names} pending", "dim")]))
    return lines


def _minutes(stage: StageView) -> float:
    minutes = stage.facts.get("minutes")
    return float(minutes) if is_number(minutes) else 0.0


def _stage_note(run: WatchedRun, stage: StageView) -> str:
    """Return minutes and attempts of a stage and, while it runs, how far it is."""
    parts = []
    status = run.status
    if stage.state == "running" and status is not None:
        if status.total_steps:
            parts.append(f"step {status.step}/{status.total_steps}")
            pace = status.seconds_per_step
            if pace:
                parts.append(f"{pace_text(pace)}/step")
                parts.append(left_text(pace * (status.total_steps - status.step)))
        elif status.work_total:
            parts.append(f"{status.work} {status.work_done}/{status.work_total}")
            if status.work_started is not None and 0 < status.work_done < status.work_total:
                spent = status.updated - status.work_started
                todo = status.work_total - status.work_done
                parts.append(left_text(spent / status.work_done * todo))
        elif status.stage_started is not None:
            parts.append(f"for {duration_text(time.time() - status.stage_started)}")
    elif stage.state == "done":
        parts.append(f"{duration_text(60 * _minutes(stage)):>7}")
    elif stage.name in run.tails and run.tails[stage.name].steps:
        parts.append(f"after step {run.tails[stage.name].steps[-1]}")
    if stage.attempts > 1:
        parts.append(f"attempt {stage.attempts}")
    return ", ".join(parts)


def _curve_sections(run: WatchedRun, screen: Screen, level: int) -> list[Text]:
    """Return the curves of the training stage in progress; with room, of the other stages too."""
    shown = run.shown_stage
    if shown is None:
        return []
    with_steps = [name for name, tail in run.tails.items() if tail.steps]
    names = [shown] if level else [*(n for n in with_steps if n != shown), shown]
    lines: list[Text] = []
    for name in names:
        lines += [*([screen.text([])] if lines else []), *_curve_lines(run, screen, name)]
    return lines


def _curve_lines(run: WatchedRun, screen: Screen, stage: str) -> list[Text]:
    """Return a table: name, sparkline, last value, lowest, highest, and the possible maximum."""
    tail = run.tails[stage]
    rows: list[tuple[str, str, int, float | None]] = []
    if "reward/mean" in tail.last:
        facts = run.rewards[stage]
        rows.append(("reward/mean", "reward", 2, facts.maximum))
        maxima = facts.maxima or {}
        rows += [(f"reward/{c}/mean", f"  {c}", 2, maxima.get(c)) for c in tail.components]
    rows += [(key, name, digits, None) for key, name, digits in ROWS if key in tail.last]
    label = min(22, max((cell_len(name) for _, name, _, _ in rows), default=0))
    room = max(8, min(screen.width - label - 38, len(tail.steps), 120))
    head = f"{stage}, steps {tail.steps[0]} to {tail.steps[-1]}"
    width = label + 2 + room
    lines = [
        screen.text(
            [
                (set_cell_size(head, width), "bold"),
                (f"{'last':>9}{'lowest':>9}{'highest':>9}", "dim"),
                (f"{'of':>7}" if any(r[3] for r in rows) else "", "dim"),
            ]
        )
    ]
    for key, name, digits, most in rows:
        curve = tail.curves.get(key, [])
        known = [v for v in curve if v is not None]
        if not known:
            continue
        numbers = "".join(f"{v:>9.{digits}f}" for v in (known[-1], min(known), max(known)))
        lines.append(
            screen.text(
                [
                    (set_cell_size(name, label) + "  ", ""),
                    (set_cell_size(sparkline(curve, room, screen.unicode), room), "cyan"),
                    (numbers, ""),
                    (f"{most:>7g}" if most is not None else "", "dim"),
                ]
            )
        )
    return lines


def sparkline(curve: Sequence[float | None], width: int, unicode: bool = True) -> str:
    """Return a curve as bars between its lowest and highest value.

    Args:
        curve: A value for each step; steps without one are blank.
        width: Most characters; each is the mean of its share of the steps.
    """
    bars = BARS if unicode else ASCII_BARS
    count = min(width, len(curve))
    means: list[float | None] = []
    for n in range(count):
        steps = curve[n * len(curve) // count : (n + 1) * len(curve) // count]
        part = [v for v in steps if v is not None]
        means.append(sum(part) / len(part) if part else None)
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    levels = len(bars) - 2
    return "".join(
        bars[0] if m is None else bars[1 + (round(levels * (m - low) / span) if span else 0)]
        for m in means
    )


def _result_lines(run: WatchedRun, screen: Screen) -> list[Text]:
    """Return held-out rewards by task and J&F by benchmark, of each checkpoint."""
    rows: list[tuple[str, list[str]]] = []
    for task, checkpoints in run.heldout.items():
        if not isinstance(checkpoints, dict):
            continue
        values = [(name, _sampled_mean(result)) for name, result in checkpoints.items()]
        shown = [f"{name} {value:.2f}" for name, value in values if value is not None]
        rows.append((f"held-out {task}, sampled", shown))
    for benchmark, scores in run.scores.items():
        shown = [f"{n} {v:.1f}" for n, v in scores.items() if is_number(v)]
        rows.append((f"J&F {benchmark}", shown))
    rows = [(label, values) for label, values in rows if values]
    width = max((cell_len(label) for label, _ in rows), default=0)
    return [
        screen.text([(set_cell_size(label, width) + "  ", "bold"), (" → ".join(values), "")])
        for label, values in rows
    ]


def _sampled_mean(result: Any) -> float | None:
    try:
        return float(result["sampled"]["mean"])
    except (KeyError, TypeError, ValueError):
        return None


def _trouble_lines(run: WatchedRun, screen: Screen) -> list[Text]:
    """Return the newest alerts, and why the last attempt failed.

    With a limited height, three alerts have a line each, and the failure has three lines.
    """
    lines: list[Text] = []
    alerts = [a for a in reversed(run.alerts) if a.code not in ("restart", "hang")]
    for alert in alerts if screen.height is None else alerts[:3]:
        style = "bold red" if alert.level == "error" else "bold yellow"
        where = f"{alert.title} ({alert.stage}, step {alert.step})"
        if screen.height is not None:
            lines.append(screen.text([(f"{alert.level}: {where}: ", style), (alert.text, "")]))
            continue
        rows = fold(f"{where}: {alert.text}", screen.width, f"{alert.level}: ", "  ")
        lines += [screen.text([(row, style if not n else "")]) for n, row in enumerate(rows)]
    status, failures = run.status, [f for stage in run.stages for f in stage.failures]
    text = ""
    if status is not None and status.state == "failed":
        text = status.message
    elif failures:
        text = str(max(failures, key=_time_of).get("text", ""))
    if text:
        rows = fold(text, screen.width - 2, "last failure: ", "  ")
        shown = rows if screen.height is None else rows[:3]
        lines += [screen.text([(row, "red")]) for row in shown]
    return lines


def _time_of(failure: dict[str, Any]) -> float:
    when = failure.get("time")
    return float(when) if is_number(when) else 0.0


def _place_lines(run: WatchedRun, screen: Screen) -> list[Text]:
    """Return memory, where trackers show the run, and the report."""
    rows = []
    memory = _memory_text(run)
    if memory:
        rows.append(("memory", memory))
    if run.status is not None:
        rows += [(str(k), str(v)) for k, v in run.status.tracking.items()]
    report = run.reader.root / "report.html"
    if report.is_file():
        rows.append(("report", str(report)))
    width = max((cell_len(name) for name, _ in rows), default=0)
    return [screen.text([(set_cell_size(name, width) + "  ", "dim"), (v, "")]) for name, v in rows]


def _memory_text(run: WatchedRun) -> str:
    """Return the memory at the last step of the stage in progress, else the peak of all stages."""
    current = run.current
    tail = run.tails.get(current.name) if current is not None else None
    if tail is not None and tail.last and current is not None and current.state == "running":
        return _step_memory(tail)
    peaks = [stage.facts.get("peak_gib") for stage in run.stages]
    known = [peak for peak in peaks if is_number(peak)]
    return f"{max(known):.1f} GiB at most" if known else ""


def _step_memory(tail: MetricsTail) -> str:
    """Return the host memory at the last step, and the most memory of a GPU during it."""
    names = {"memory_gib/node/used_max": "used", "memory_gib/node/free_min": "free"}
    values = {n: tail.last.get(key) for key, n in names.items()}
    parts = [f"{v:.1f} GiB {name}" for name, v in values.items() if is_number(v)]
    gpus = [v for k, v in tail.last.items() if _GPU_MEMORY.fullmatch(k) and is_number(v)]
    if gpus:
        parts.append(f"{max(gpus):.1f} GiB of a GPU")
    return ", ".join(parts)
