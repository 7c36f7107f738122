"""The model card of a tiny SAM2: what `sam2_train` did, and how `sam2_eval` judges the result."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rcot_rl.inference.segmenter import load_segmenter
from rcot_rl.tiny.sam2_data import LATTICE_SHARE, TRAIN_STREAM
from rcot_rl.tiny.sam2_eval import CLIPS, EVAL_STREAM, StaticBox, evaluate

JUDGED = ("lattice", "rich")
_COLUMNS = {
    "j_key": "J key",
    "j_video": "J video",
    "j_where_visible": "J where visible",
    "empty_where_absent": "empty where absent",
}

Figures = dict[str, dict[str, dict[str, float]]]
"""Of each preset, each segmenter's, as `evaluate` gives them."""


@dataclass(frozen=True)
class Made:
    """One run of training: its options, and what came of them."""

    minutes: float
    seed: int
    start_from: Path | None
    steps: int
    cpu_minutes: float
    parameters: int


def judge(folder: Path, clips: int = CLIPS) -> Figures:
    """`folder`'s checkpoint, the static box and the flow propagator on the same held-out clips."""
    segmenters = [StaticBox(), load_segmenter("flow"), load_segmenter(str(folder))]
    return {preset: {s.name: evaluate(s, clips, preset) for s in segmenters} for preset in JUDGED}


def write_card(folder: Path, made: Made, figures: Figures | None = None) -> None:
    """README.md of the checkpoint in `folder`, in one step; without figures it says so."""
    partial = folder / ".README.md.part"
    partial.write_text(model_card(folder.name, made, figures), encoding="utf-8")
    os.replace(partial, folder / "README.md")


def model_card(name: str, made: Made, figures: Figures | None) -> str:
    """The card's text. name: of the checkpoint."""
    start = "" if made.start_from is None else f" --from {made.start_from.name}"
    first = "from scratch" if made.start_from is None else f"from `{made.start_from.name}`"
    told = (
        _tables(figures)
        if figures
        else "Not judged: a checkpoint of a run that went on, or broke off.\n"
    )
    return f"""# {name}

A SAM2 video model of {made.parameters / 1e6:.2f} M parameters, trained {first} on procedural clips.
It is the segmenter of the laptop recipe and of the tests: architecture and code path are those of
the released SAM2 weights, only sizes shrink. It knows the shapes of the toy corpora and nothing
else; use released weights on real video. float16 safetensors in transformers' Sam2Video format;
load them as float32 (`load_segmenter` does).

## Made by

    python -m rcot_rl.tiny.sam2_train{start} --out DIR --minutes {made.minutes:g} --seed {made.seed}

{made.steps} steps, {made.cpu_minutes:.1f} CPU minutes on one core (float32, one thread). A run is
cut by CPU time, so its number of steps depends on the machine.

Clips are {LATTICE_SHARE:.0%} `lattice` and {1 - LATTICE_SHARE:.0%} `rich`, from
`numpy.random.default_rng([{TRAIN_STREAM}, {made.seed}])`, a stream that no corpus uses; mirrored,
reversed and with permuted colour channels at random. Prompts: a jittered box and a positive point.
What is saved is a moving average of the weights.

## Figures

{told}"""


def _tables(figures: Figures) -> str:
    lines = [
        "    python -m rcot_rl.tiny.sam2_eval DIR flow [--preset rich]",
        "",
        f"Held-out clips (`default_rng([{EVAL_STREAM}, k])`), every object prompted with its",
        "true box and most interior point on the middle one of the frames that show it. J at that",
        "frame, J over all frames (1 where truth and mask are both empty), J over the frames that",
        "show the object, and the share of frames without it in which the mask is empty. Means",
        "over objects, frames for the last. The static box is the baseline; flow needs no weights.",
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
