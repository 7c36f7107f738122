"""Draw docs/images/result.png: frames of a clip with its masks, and what the policy wrote.

    make run
    python benchmarks/studies/result_picture.py runs/laptop \
        runs/laptop/corpora/mevis/valid_u/JPEGImages/59f4c6690001 "the yellow circle"

Masks and trace are those of `rcot segment` with the policy of the run's last stage and the tiny
SAM2. Another run writes other responses, because rollouts depend on which requests meet in a batch.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import textwrap
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from rcot_rl.inference.overlay import draw_overlay
from rcot_rl.inference.segment import segment
from rcot_rl.inference.video import read_clip
from rcot_rl.system.files import write_bytes

TASKS = {"vdg": "describe", "kfg": "select", "aks": "judge", "kfg_again": "select", "ktg": "ground"}
SHOWN = 5
SCALE = 3


def draw(frames: Path, result: Path, out: Path) -> None:
    """Draw `SHOWN` frames, with the judged ones, above the responses."""
    trace = json.loads((result / "trace.json").read_text(encoding="utf-8"))
    clip, key = read_clip(frames), trace["keyframe"]
    judged = {step["frame"] for step in trace["steps"] if step["task"] == "aks"} | {key}
    others = [i for i in range(len(clip.names)) if i not in judged]
    spread = np.linspace(0, len(others) - 1, max(0, SHOWN - len(judged))).round().astype(int)
    chosen = sorted(judged | {others[i] for i in spread})
    figure = Figure(figsize=(8, 3.25))
    axes = figure.subplots(1, len(chosen))
    for axis, index in zip(axes, chosen, strict=True):
        frame = cv2.resize(clip.images[index], None, fx=SCALE, fy=SCALE)
        mask = cv2.imread(str(result / "masks" / f"{clip.names[index]}.png"), cv2.IMREAD_GRAYSCALE)
        mask = cv2.resize(mask, frame.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
        boxes = SCALE * np.array(trace["boxes_source"]) if index == key else ()
        drawn = draw_overlay(frame, mask, boxes, opacity=0.5)
        contours, _ = cv2.findContours(
            mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        axis.imshow(cv2.drawContours(drawn, contours, -1, (255, 255, 255), 3))
        verdict = ": keyframe (A)" if index == key else ": refused (B)" if index in judged else ""
        axis.set_title(f"frame {index}{verdict}", fontsize=8.5, pad=3)
        axis.axis("off")
    lines = [f'query: "{trace["query"]}"']
    for step in trace["steps"]:
        where = "" if step["frame"] is None else f" frame {step['frame']}"
        lines.append(f"{TASKS[step['task']]}{where}: {' '.join(step['response'].split())}")
    text = "\n".join(textwrap.fill(line, 126, subsequent_indent="    ") for line in lines)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.94, bottom=0.5, wspace=0.04)
    figure.text(0.012, 0.46, text, family="monospace", fontsize=7.4, va="top", linespacing=1.4)
    png, small = io.BytesIO(), io.BytesIO()
    figure.savefig(png, dpi=140)
    Image.open(png).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, "png")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, small.getvalue())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run of recipes/laptop.yaml")
    parser.add_argument("frames", type=Path, help="a folder of frames")
    parser.add_argument("query")
    parser.add_argument("--out", type=Path, default=Path("docs/images/result.png"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = str(arguments.run / "grpo-ktg" / "model")
        segment(arguments.frames, arguments.query, Path(folder) / "out", model=model)
        draw(arguments.frames, Path(folder) / "out", arguments.out)
