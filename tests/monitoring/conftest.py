"""A synthetic run folder: a small corpus, its predictions, metrics and rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from rcot_rl.evaluation.benchmarks import evaluate, evaluate_masks
from rcot_rl.evaluation.mask_baselines import BASELINES

SaveJson = Callable[[Path, object], None]

HEIGHT, WIDTH, FRAMES = 96, 128, 6
NASTY = '<script>alert("query")</script> & the "red" one'
COLOURS = ((210, 60, 50), (60, 90, 200), (50, 160, 90))


def discs(rng: np.random.Generator) -> np.ndarray:
    """Return masks of a disc that moves and grows: bool [T, H, W]."""
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]
    y, x, radius = rng.uniform(25, 70), rng.uniform(30, 90), rng.uniform(8, 16)
    dy, dx = rng.uniform(-3, 3, 2)
    return np.stack(
        [
            (ys - y - t * dy) ** 2 + (xs - x - t * dx) ** 2 < (radius + 1.5 * t) ** 2
            for t in range(FRAMES)
        ]
    )


def write_corpus(root: Path, n_videos: int, save_json: SaveJson) -> dict[str, np.ndarray]:
    """Write a ReasonVOS corpus with one expression per video; return {video: masks}."""
    videos, masks = {}, {}
    for k in range(n_videos):
        rng = np.random.default_rng([5, k])
        name, masks_thw = f"clip-{k:02d}", discs(rng)
        masks[name] = masks_thw
        stems = [f"{t:05d}" for t in range(FRAMES)]
        for stem, mask in zip(stems, masks_thw, strict=True):
            ys, xs = np.mgrid[:HEIGHT, :WIDTH]
            frame = np.stack([90 + ys // 2, 100 + xs // 3, 120 + (xs + ys) // 4], axis=-1)
            frame[mask] = COLOURS[k % 3]
            path = root / "JPEGImages" / name / f"{stem}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), frame[..., ::-1].astype(np.uint8))
            label = root / "Annotations" / f"MOSE_{name}_1" / f"{stem}.png"
            label.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8)).save(label)
        query = NASTY if k == 0 else f"the shape number {k}, which moves on its own"
        expression = {"obj_id": 1, "exp_id": 0, "exp_text": query, "is_sent": True}
        videos[name] = {"source": "MOSE", "frames": stems, "expressions": [expression]}
    save_json(root / "meta_expressions.json", {"videos": videos})
    return masks


def write_predictions(
    root: Path, masks: dict[str, np.ndarray], spread: float, seed: int, save_json: SaveJson
) -> None:
    rng = np.random.default_rng([seed, 2])
    for name, masks_thw in masks.items():
        shift = rng.normal(0, spread, 2).round().astype(int)
        moved = np.roll(masks_thw, tuple(int(v) for v in shift), axis=(1, 2))
        folder = root / name / "0"
        folder.mkdir(parents=True, exist_ok=True)
        for t, mask in enumerate(moved):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{t:05d}.png")
        keyframe = int(rng.integers(FRAMES))
        ys, xs = np.nonzero(moved[keyframe])
        trace = {
            "query": "q",
            "description": "A <b>disc</b> drifts over a gradient.",
            "keyframe": keyframe,
            "initial_keyframe": 0,
            "rounds": int(rng.integers(1, 4)),
            "boxes_source": [[float(xs.min()), float(ys.min()), xs.max() + 1.0, ys.max() + 1.0]],
            "points_source": [[float(xs.mean()), float(ys.mean())]],
            "steps": [
                {"task": "kfg", "frame": None, "response": "<think>first?</think><answer>0"},
                {
                    "task": "ktg",
                    "frame": keyframe,
                    "response": "<img src=x onerror=alert(1)> \ud800",
                },
            ],
            "faults": ["ktg:point_outside"] if name.endswith("3") else [],
            "segmenter": "tiny-sam2",
        }
        save_json(folder / "trace.json", trace)


def write_metrics(run: Path, steps: int) -> None:
    rng = np.random.default_rng(3)
    lines = [
        {"step": s, "time": s, "train/loss": 2.5 * math.exp(-s / 25) + rng.normal(0, 0.03) + 0.3}
        | ({"val/loss": 2.5 * math.exp(-s / 25) + 0.35} if s % 20 == 0 else {})
        for s in range(1, 2 * steps + 1)
    ]
    save_lines(run / "sft" / "metrics.jsonl", lines)
    for stage, top in (("grpo-aks", 3.0), ("grpo-ktg", 6.0)):
        lines = []
        for s in range(1, steps + 1):
            gain = 1 - math.exp(-s / 30)
            lines.append(
                {
                    "step": s,
                    "time": 1e9 + 12 * s,
                    "reward/mean": top * (0.6 + 0.25 * gain) + rng.normal(0, 0.12),
                    "reward/format/mean": 0.9 + 0.1 * gain + rng.normal(0, 0.02),
                    "reward/accuracy/mean": 0.4 + 0.4 * gain + rng.normal(0, 0.05),
                    "group/zero_variance_fraction": float(np.clip(rng.normal(0.3, 0.1), 0, 1)),
                    "response_length/mean": 80 + 10 * gain + rng.normal(0, 1),
                    "actor/kl_loss": 0.001 * s / steps + abs(rng.normal(0, 1e-4)),
                    "timing_s/step": 11 + rng.normal(0, 0.4),
                }
            )
        save_lines(run / stage / "metrics.jsonl", lines)


def save_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rewards(n: int) -> dict:
    rng = np.random.default_rng(4)
    out: dict[str, dict] = {}
    for task, top in (("aks", 3.0), ("ktg", 6.0)):
        base = rng.uniform(0.3, 0.9, n) * top
        out[task] = {}
        for k, name in enumerate(("sft", "grpo-aks", "grpo-ktg")):
            out[task][name] = {"prompts": [str(i) for i in range(n)]}
            for way in ("sampled", "greedy"):
                values = base + 0.06 * top * k * rng.uniform(0, 2, n) * (way == "sampled")
                out[task][name][way] = {"mean": values.mean(), "per_prompt": list(values)}
    return out


@pytest.fixture
def make_run(tmp_path: Path, save_json: SaveJson) -> Callable[..., Path]:
    def make(n_videos: int = 5, steps: int = 40, prompts: int = 64) -> Path:
        run, corpus = tmp_path / "run", tmp_path / "corpus"
        masks = write_corpus(corpus, n_videos, save_json)
        recipe = {"name": "made-up", "seed": 1, "device": "cpu", "toy": {"preset": "lattice"}}
        recipe["models"] = {"policy": "tiny", "segmenter": "tiny"}
        recipe["train"] = {stage: {} for stage in ("sft", "grpo-aks", "grpo-ktg")}
        record = {
            "recipe_hash": "0123456789abcdef" * 4,
            "git_commit": "feedc0ffee",
            "python": "3.11",
            "versions": {"verl": "0.9.1", "torch": "2.11.0"},
            "recipe": recipe,
        }
        run.mkdir()
        (run / "recipe.yaml").write_text(yaml.safe_dump(record))
        for stage, minutes in (("data", 0.7), ("sft", 2.1), ("grpo-aks", 4.5)):
            (run / stage / "attempt-1").mkdir(parents=True)
            save_json(run / stage / "done.json", {"minutes": minutes, "peak_gib": 5.5})
        (run / "grpo-ktg" / "attempt-2").mkdir(parents=True)
        write_metrics(run, steps)
        save_json(run / "predict" / "rewards.json", rewards(prompts))
        checkpoints = {}
        for k, name in enumerate(("sft", "grpo-aks", "grpo-ktg")):
            last = name == "grpo-ktg"
            place = run / ("predictions" if last else f"predict/{name}") / "reasonvos-valid"
            write_predictions(place, masks, (9.0, 7.0, 4.0)[k], k, save_json)
            checkpoints[name] = evaluate("reasonvos", corpus, "valid", place)
        baselines = {
            name: evaluate_masks("reasonvos", corpus, "valid", method)
            for name, method in BASELINES.items()
        }
        whole = checkpoints["grpo-ktg"] | {"checkpoints": checkpoints, "baselines": baselines}
        save_json(run / "eval" / "reasonvos-valid.json", whole)
        return run

    return make
