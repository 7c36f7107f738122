"""Model card of a tiny SAM2: the training run and the figures of `sam2_eval`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rcot_rl.segmentation.segmenter import VideoSegmenter, load_segmenter
from rcot_rl.system.files import write_text
from rcot_rl.tiny.sam2_data import PRESET_SHARES, TRAIN_STREAM
from rcot_rl.tiny.sam2_eval import CLIPS, EVAL_STREAM, StaticBox, evaluate

_COLUMNS = {
    "j_key": "J key",
    "j_video": "J video",
    "j_where_visible": "J where visible",
    "empty_where_absent": "empty where absent",
}

Figures = dict[str, dict[str, dict[str, float]]]
"""Preset -> segmenter -> figures of `evaluate`."""


@dataclass(frozen=True)
class TrainingRun:
    """Options and results of one training run."""

    seed: int
    steps: tuple[int, ...]
    """Steps of each stage."""
    cpu_minutes: float
    parameters: int


def judge(folder: Path, clips: int = CLIPS) -> Figures:
    """Evaluate the checkpoint in `folder`, the static box and optical flow on the same clips."""
    segmenters: list[VideoSegmenter] = [
        StaticBox(),
        load_segmenter("flow"),
        load_segmenter(str(folder)),
    ]
    return {
        preset: {s.name: evaluate(s, clips, preset) for s in segmenters} for preset in PRESET_SHARES
    }


def write_card(folder: Path, run: TrainingRun, figures: Figures | None = None) -> None:
    """Write README.md of the checkpoint in `folder` atomically."""
    write_text(folder / "README.md", model_card(folder.name, run, figures))


def model_card(name: str, run: TrainingRun, figures: Figures | None) -> str:
    """Return the text of the card of checkpoint `name`; without figures it says so."""
    shares = ", ".join(f"{share:.0%} `{preset}`" for preset, share in PRESET_SHARES.items())
    unfinished = "Not evaluated: a checkpoint of a run that was not finished.\n"
    return f"""# {name}

A SAM2 video model of {run.parameters / 1e6:.2f} M parameters, trained from scratch on procedural
clips. It is the segmenter of the laptop recipe and of the tests: architecture and code path are
those of the released SAM2 weights, with smaller sizes. It only knows the shapes of the toy corpora;
use released weights for real video. float16 safetensors in transformers' Sam2Video format; load
them as float32 (`load_segmenter` does).

## Command

    python -m rcot_rl.tiny.sam2_train --out DIR --seed {run.seed}

{" + ".join(map(str, run.steps))} steps, {run.cpu_minutes:.1f} CPU minutes on one core (float32, one
thread). Numbers may differ in the last digits on another processor.

Clips are {shares}, from
`numpy.random.default_rng([{TRAIN_STREAM}, {run.seed}])`, a stream that no corpus uses; randomly
mirrored, reversed and with permuted colour channels. Prompts: a jittered box and a positive point.
The saved weights are a moving average.

## Figures

{_tables(figures) if figures else unfinished}"""


def _tables(figures: Figures) -> str:
    lines = [
        "    python -m rcot_rl.tiny.sam2_eval DIR flow [--preset rich]",
        "",
        f"Held-out clips (`default_rng([{EVAL_STREAM}, k])`). Every object is prompted with its",
        "true box and most interior pixel in the middle one of the frames that show it. J at that",
        "frame, J over all frames (1 if truth and mask are both empty), J over the frames that",
        "show the object: means over objects. Last column: the share of frames without the object",
        "in which the mask is empty. The static box is the baseline; flow needs no weights.",
    ]
    for preset, rows in figures.items():
        objects = next(iter(rows.values()))["objects"]
        lines += ["", _row(f"`{preset}`, {objects:g} objects", _COLUMNS.values())]
        lines.append("| --- " * (len(_COLUMNS) + 1) + "|")
        for name, row in rows.items():
            lines.append(_row(name, (f"{row[key]:.3f}" for key in _COLUMNS)))
    return "\n".join(lines) + "\n"


def _row(first: str, rest: Iterable[str]) -> str:
    return f"| {' | '.join([first, *rest])} |"
