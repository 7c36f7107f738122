"""Pre-train the tiny policy from scratch: `python -m rcot_rl.tiny.policy_train --out DIR`.

Trains every parameter, with Muon for matrices and AdamW for the rest, on batches of images or of
videos from clips that no corpus has. One core is enough; more do not help. Writes the checkpoint,
its processor and a model card with the figures of the run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.tiny.policy_data import (
    PRESET,
    STREAM,
    PolicyClip,
    PretrainSample,
    image_sample,
    make_clips,
    video_sample,
)
from rcot_rl.tiny.policy_eval import figures
from rcot_rl.tiny.policy_model import (
    PolicyBatch,
    PolicyEncoder,
    PolicySize,
    build_model,
    hidden_states,
    save_policy,
)
from rcot_rl.tiny.tokenizer import build_tokenizer

BUCKET = 16
"""Number of batches drawn together and sorted by length, to reduce padding."""


@dataclass(frozen=True)
class PretrainPlan:
    """All settings of a run; they determine its checkpoint."""

    steps: int = 5000
    seed: int = 0
    clips: int = 4000
    batch: int = 16
    video_share: float = 0.4
    muon_rate: float = 3e-3
    adam_rate: float = 2.5e-3
    weight_decay: float = 0.01
    warmup: int = 40
    noise: float = 4.0
    """Largest random change of a pixel value, drawn for each batch."""


def learning_rate(step: int, plan: PretrainPlan) -> float:
    """Return the share of the peak rate at a step: linear warm-up, then a cosine down to 1 %."""
    decay = 0.5 * (1 + math.cos(math.pi * step / plan.steps))
    return min(1.0, (step + 1) / plan.warmup) * (0.01 + 0.99 * decay)


def optimizers(
    model: torch.nn.Module, plan: PretrainPlan
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return (optimizer, peak rate): Muon for the layers' matrices, AdamW for the others."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if hidden else others).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=plan.muon_rate,
        weight_decay=plan.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(
        others, lr=plan.adam_rate, weight_decay=plan.weight_decay, betas=(0.9, 0.98)
    )
    return [(muon, plan.muon_rate), (adam, plan.adam_rate)]


def shuffled(
    rng: np.random.Generator, draw: Callable[[], PretrainSample], size: int
) -> Iterator[Sequence[PretrainSample]]:
    """Yield endless batches of samples of similar length."""
    while True:
        samples = sorted(
            (draw() for _ in range(BUCKET * size)), key=lambda s: len(s.prompt) + len(s.response)
        )
        for row in rng.permutation(BUCKET):
            yield samples[row * size : (row + 1) * size]


def batches(
    clips: Sequence[PolicyClip], encoder: PolicyEncoder, plan: PretrainPlan
) -> Iterator[PolicyBatch]:
    """Yield endless training batches, images and videos in the plan's shares."""
    rng = np.random.default_rng([STREAM, plan.seed, 2])
    prompts = load_prompts("compact")

    def clip() -> PolicyClip:
        return clips[int(rng.integers(len(clips)))]

    images = shuffled(rng, lambda: image_sample(rng, clip()), plan.batch)
    videos = shuffled(rng, lambda: video_sample(rng, clip(), prompts), plan.batch)
    while True:
        video = rng.random() < plan.video_share
        samples = next(videos if video else images)
        frames = np.stack([s.frames for s in samples])
        low, high = -int(plan.noise), int(plan.noise) + 1
        jitter = rng.integers(low, high, frames.shape, dtype=np.int16)
        frames = np.clip(frames + jitter, 0, 255).astype(np.uint8)
        yield encoder.batch([s.prompt for s in samples], [s.response for s in samples], frames)


def loss_of(model: Qwen2_5_VLForConditionalGeneration, batch: PolicyBatch) -> torch.Tensor:
    """Return the mean cross entropy of the responses' tokens."""
    hidden = hidden_states(model, batch, use_cache=False).last_hidden_state
    chosen = batch.labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][chosen])
    return torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:][chosen])


def train(
    model: Qwen2_5_VLForConditionalGeneration,
    stream: Iterator[PolicyBatch],
    plan: PretrainPlan,
    every: int,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """Train as planned; every `every` steps, `report` gets the mean losses since the last call."""
    schedules = optimizers(model, plan)
    losses: dict[str, list[float]] = {"image": [], "video": []}
    for step in range(plan.steps):
        model.train()
        batch = next(stream)
        for optimizer, peak in schedules:
            optimizer.param_groups[0]["lr"] = peak * learning_rate(step, plan)
            optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in schedules:
            optimizer.step()
        losses[batch.media].append(loss.item())
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            report(step + 1, {k: float(np.mean(v)) for k, v in losses.items() if v})
            losses = {"image": [], "video": []}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save checkpoints on the way and write the model card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=PretrainPlan.steps)
    parser.add_argument("--seed", type=int, default=PretrainPlan.seed)
    parser.add_argument(
        "--clips", type=int, default=PretrainPlan.clips, help="clips drawn in memory"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=1000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plan = replace(PretrainPlan(), steps=options.steps, seed=options.seed, clips=options.clips)
    started = time.monotonic()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, PolicySize(), plan.seed)
    encoder = PolicyEncoder(tokenizer)
    held_out = make_clips([plan.seed, 1], 256)
    clips = make_clips([plan.seed, 0], plan.clips)
    prompts = load_prompts("compact")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f} M parameters, {len(clips)} clips, {_minutes(started)} min", flush=True)

    def report(step: int, losses: dict[str, float]) -> None:
        line = {"step": step, "minutes": _minutes(started), **losses}
        if step % options.save_every == 0 or step == plan.steps:
            scores = figures(model, encoder, held_out, prompts)
            save_policy(model, tokenizer, options.out)
            card = model_card(plan, step, _minutes(started), size, scores)
            (options.out / "README.md").write_text(card, encoding="utf-8")
            line |= scores
        print(json.dumps(line), flush=True)

    train(model, batches(clips, encoder, plan), plan, every=50, report=report)


def _minutes(started: float) -> float:
    return round((time.monotonic() - started) / 60, 1)


def model_card(
    plan: PretrainPlan, step: int, minutes: float, size: float, scores: Mapping[str, float]
) -> str:
    """Return the README.md of the checkpoint's folder."""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in scores.items())
    state = "" if step == plan.steps else f" (an early checkpoint: step {step} of {plan.steps})"
    return f"""# tiny-qwen2.5-vl

A Qwen2.5-VL of {size:.2f} M parameters with its own tokenizer, chat template and processor,
trained from scratch on procedural clips{state}. It is the base model of the laptop recipe and of
the tests: the architecture is the production one, with smaller sizes. It only knows the coloured
shapes of the toy corpora's `{PRESET}` preset; it is of no use for real video.

## Command

    python -m rcot_rl.tiny.policy_train --out DIR --steps {plan.steps} --seed {plan.seed}

{step} steps of {plan.batch} samples, {minutes} minutes on one CPU core, {plan.clips} clips drawn
from `numpy.random.default_rng([{STREAM}, {plan.seed}, 0])`, a stream that no corpus uses. Numbers
may differ in the last digits on another processor.

It was trained to describe a clip, to name a keyframe, to list and ground shapes and to resolve a
query. It has not seen the AKS and KTG prompts: CoT-SFT and GRPO teach those.

Images are 112 x 112 (16 tokens), videos 8 frames of 112 x 112 (64 tokens). Give every video
`fps = 2` in its metadata, whatever its real rate is: it determines the temporal positions, and the
policy knows no others.

## Figures

On 256 new clips (`[{STREAM}, {plan.seed}, 1]`), greedy:

| figure | value |
| --- | --- |
{rows}

`vdg_exact`: the whole description is correct. `kfg_visible`: the chosen frame shows a target
(`kfg_visible_chance`: a random frame does); `kfg_exact`: it is the keyframe. `detection_iou`: mean
IoU of the boxes in "List the shapes.", over visible shapes; `presence`: hidden or not, per shape;
`scene_exact`: the whole list is correct to the pixel.
"""


if __name__ == "__main__":
    main()
