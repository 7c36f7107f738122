"""`rcot wandb sync`: send a run folder to W&B, by a follower that ends once everything is sent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cluster.preflight.at_start import check_login
from cluster.supervise.run_tracking import MODULE, delivery_line
from rcot_rl.errors import InputError
from rcot_rl.monitoring.run_files.run_reader import RunReader
from rcot_rl.monitoring.terminal.console import Console
from rcot_rl.monitoring.trackers.tracker_choice import WANDB
from rcot_rl.monitoring.trackers.tracker_state import delivery_of, read_state
from rcot_rl.recipe.tracking_section import TRACKING
from rcot_rl.system.files import writing

_ONLINE = WANDB["online"]
_SHOW_S = 2.0
"""Seconds between two updates of the progress."""


def sync_run(run: Path) -> tuple[str, bool]:
    """Send a run folder to W&B, whatever its recipe's `wandb.mode` is.

    Returns:
        What was sent, in lines, and whether that is everything.

    Raises:
        InputError: `run` is no run folder, or W&B has no login.
    """
    reader = RunReader(run)
    if not reader.record:
        raise InputError("is not a run's folder: it has no readable recipe.yaml", file=run)
    check_login()
    console, log = Console(), run / TRACKING / f"{_ONLINE}.log"
    with writing(run):
        log.parent.mkdir(exist_ok=True)
        output = log.open("ab")
    with output:
        start = output.tell()
        words = [sys.executable, "-m", MODULE, str(run), _ONLINE, "--once"]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while not _ended(process):
                delivery = delivery_of(reader, read_state(run, _ONLINE))
                console.progress("W&B: steps", delivery.sent, delivery.total)
        except BaseException:
            process.terminate()
            raise
    if process.returncode == 2:
        lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        raise InputError(lines[-1].partition(": ")[2] if lines else "failed", file=run)
    line, complete = delivery_line(run, _ONLINE)
    where = read_state(run, _ONLINE).where
    return "\n".join([line, where] if where else [line]), complete


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_SHOW_S)
    except subprocess.TimeoutExpired:
        return False
    return True
