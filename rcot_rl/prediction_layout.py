"""Paths of predictions on disk, for the code that writes them and the code that reads them.

    RUN/predict/rewards.json                      held-out rewards of each checkpoint and task
    RUN/predict/heldout/<task>/<checkpoint>-<way>.jsonl
                                                  held-out responses, sampled and greedy, in the
                                                  format of a step's rollouts
    RUN/predict/<name>/<benchmark>/               predictions of the other checkpoints, baselines,
                                                  upper bounds, and variants (named
                                                  <checkpoint>@<variant>)
    RUN/predict/.masks/                           masks that several predictions share
    RUN/predictions/<benchmark>/                  predictions of the last checkpoint

<benchmark> is <dataset>-<split>, as in RUN/eval/<benchmark>.json. Each folder of predictions holds:

    settings.json                                 what the predictions were made with
    failures.json                                 <video>/<expression_id>: why there is none
    <video>/<expression_id>/<frame>.png           single channel, 0 or 255, source size
    <video>/<expression_id>/trace.json            the model's responses, keyframe, boxes and points
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from rcot_rl.errors import InputError

SETTINGS_FILE = "settings.json"
FAILURES_FILE = "failures.json"
TRACE_FILE = "trace.json"

Way = Literal["sampled", "greedy"]
"""How held-out responses are decoded."""

WAYS: tuple[Way, ...] = get_args(Way)


def heldout_rewards_file(run: Path) -> Path:
    """Return the path of a run's held-out rewards."""
    return run / "predict" / "rewards.json"


def heldout_responses_file(run: Path, task: str, checkpoint: str, way: Way) -> Path:
    """Return the path of a checkpoint's scored responses to the held-out prompts of a task."""
    return run / "predict" / "heldout" / task / f"{checkpoint}-{way}.jsonl"


def shared_masks(run: Path) -> Path:
    """Return the folder of the masks that a run's predictions and held-out rewards share."""
    return run / "predict" / ".masks"


def benchmark_name(dataset: str, split: str) -> str:
    """Return the name of a benchmark's files and folders in a run."""
    return f"{dataset}-{split}"


def benchmark_predictions(run: Path, benchmark: str, checkpoint: str | None = None) -> Path:
    """Return the folder of a run's predictions on a benchmark.

    Args:
        run: The run folder.
        benchmark: The result of `benchmark_name`.
        checkpoint: Name of the checkpoint or baseline; None: the run's last checkpoint.
    """
    if checkpoint is None:
        return run / "predictions" / benchmark
    return run / "predict" / checkpoint / benchmark


def expression_folder(
    root: Path, video: str, expression: str, *, allow_hidden: bool = False
) -> Path:
    """Return ROOT/<video>/<expression>, which is always below ROOT.

    Args:
        root: A folder of predictions.
        video: The video's id; it may have slashes.
        expression: The expression's id.
        allow_hidden: Accept ids with a part that starts with a dot, as in predictions made
            elsewhere. Partial results are hidden folders, so such ids are never written.

    Raises:
        InputError: An id cannot name a folder below ROOT.
    """
    for name, kind in ((video, "video"), (expression, "expression")):
        parts = PurePosixPath(name).parts
        refused = {".."} if allow_hidden else {part for part in parts if part.startswith(".")}
        invalid = not parts or name.startswith("/") or "\0" in name or "\\" in name
        if invalid or not refused.isdisjoint(parts):
            raise InputError(f"the id of this {kind} cannot name a folder", key=name)
    return root / video / expression


def mask_file(folder: Path, frame: str) -> Path:
    """Return the path of a frame's mask in an expression's folder."""
    return folder / f"{frame}.png"
