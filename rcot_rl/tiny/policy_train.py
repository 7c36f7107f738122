"""Pre-train the tiny policy from scratch: `python -m rcot_rl.tiny.policy_train --out DIR`.

Trains every parameter, with Muon for matrices and AdamW for the rest, on batches of images or of
videos from clips that no corpus has and none of which is drawn twice. Writes the checkpoint, its
processor and a model card with the figures of the run, and DIR.state to continue from.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.tiny.fast_forward import fast_forward
from rcot_rl.tiny.patch_head import PatchHead, merged_cells
from rcot_rl.tiny.policy_data import (
    PRESET_NAMES,
    STREAM,
    image_sample,
    make_clip,
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

    steps: int = 20_000
    seed: int = 0
    batch: int = 16
    reuse: int = 4
    """Samples per clip."""
    patch_weight: float = 0.5
    muon_rate: float = 3e-3
    adam_rate: float = 2.5e-3
    weight_decay: float = 0.01
    warmup: int = 40
    constant: int = 8000
    """Step at which the rate starts to fall."""
    noise: float = 4.0
    """Largest random change of a pixel value, drawn for each batch."""


def learning_rate(step: int, plan: PretrainPlan) -> float:
    """Return the share of the peak rate: linear warm-up, constant, linear decay to 1 %."""
    decay = min(1.0, (plan.steps - step) / max(1, plan.steps - plan.constant))
    return min(1.0, (step + 1) / plan.warmup) * max(0.01, decay)


def optimizers(
    model: torch.nn.Module, head: torch.nn.Module, plan: PretrainPlan
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return (optimizer, peak rate): Muon for the layers' matrices, AdamW for the others."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = [*head.parameters()]
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


class Buckets(torch.utils.data.IterableDataset):
    """Endless training batches of ever fresh clips; each bucket depends only on its number.

    A bucket is 16 batches of one media kind, sorted by length to reduce padding.
    """

    def __init__(self, encoder: PolicyEncoder, plan: PretrainPlan, done: int) -> None:
        """Start after `done` batches."""
        self.encoder, self.plan, self.done = encoder, plan, done
        self.prompts = load_prompts("compact")

    def __iter__(self) -> Iterator[PolicyBatch]:
        first, skipped = divmod(self.done, BUCKET)
        numbers = itertools.count(first)
        every = itertools.chain.from_iterable(map(self.bucket, numbers))
        return itertools.islice(every, skipped, None)

    def bucket(self, number: int) -> Iterator[PolicyBatch]:
        """Yield the 16 batches of a bucket."""
        plan = self.plan
        rng = np.random.default_rng([STREAM, plan.seed, 2, number])
        size = plan.batch
        clips = [make_clip(rng) for _ in range(BUCKET * size // plan.reuse)]
        drawn = [clips[i] for i in rng.permutation(BUCKET * size) % len(clips)]
        if number % 2:
            samples = [video_sample(rng, clip, self.prompts) for clip in drawn]
        else:
            samples = [image_sample(rng, clip) for clip in drawn]
        samples.sort(key=lambda s: len(s.prompt) + len(s.response))
        low, high = -int(plan.noise), int(plan.noise) + 1
        for row in rng.permutation(BUCKET):
            part = samples[row * size : (row + 1) * size]
            frames = np.stack([s.frames for s in part])
            jitter = rng.integers(low, high, frames.shape, dtype=np.int16)
            frames = np.clip(frames + jitter, 0, 255).astype(np.uint8)
            batch = self.encoder.batch([s.prompt for s in part], [s.response for s in part], frames)
            yield replace(batch, cells=merged_cells(np.stack([s.cells for s in part])))


class PatchHeads(torch.nn.Module):
    """The head of the vision tower and that of the language model's middle layer."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        size: Any = model.config.text_config
        self.layer = (size.num_hidden_layers - 1) // 2
        self.vision = PatchHead(size.hidden_size, time=False)
        self.language = PatchHead(size.hidden_size, time=True)


def train_losses(
    model: Qwen2_5_VLForConditionalGeneration, heads: PatchHeads, batch: PolicyBatch, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean cross entropy of the responses' tokens, and the heads' loss.

    Args:
        pad: The token that stands for a merged patch.
    """
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        outputs[name] = value

    hooks = [
        model.model.visual.register_forward_hook(
            lambda _module, _inputs, output: keep("vision", output.pooler_output)
        ),
        model.model.language_model.layers[heads.layer].register_forward_hook(
            lambda _module, _inputs, output: keep(
                "language", output[0] if isinstance(output, tuple) else output
            )
        ),
    ]
    try:
        loss = loss_of(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    patches = outputs["language"][batch.ids == pad]
    return loss, heads.vision(outputs["vision"], batch.cells) + heads.language(patches, batch.cells)


def loss_of(model: Qwen2_5_VLForConditionalGeneration, batch: PolicyBatch) -> torch.Tensor:
    """Return the mean cross entropy of the responses' tokens."""
    hidden = hidden_states(model, batch, use_cache=False).last_hidden_state
    chosen = batch.labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][chosen])
    return torch.nn.functional.cross_entropy(logits.float(), batch.labels[:, 1:][chosen])


@dataclass
class TrainState:
    """Everything that a training step changes."""

    model: Qwen2_5_VLForConditionalGeneration
    head: PatchHeads
    optimizers: list[tuple[torch.optim.Optimizer, float]]
    step: int = 0
    minutes: float = 0.0

    def parts(self) -> list[torch.nn.Module | torch.optim.Optimizer]:
        """Return everything with a state, always in the same order."""
        return [self.model, self.head, *(optimizer for optimizer, _ in self.optimizers)]

    def save(self, file: Path) -> None:
        """Write the state, atomically."""
        partial = file.with_suffix(".partial")
        torch.save(
            {
                "step": self.step,
                "minutes": self.minutes,
                "parts": [part.state_dict() for part in self.parts()],
            },
            partial,
        )
        partial.replace(file)

    def load(self, file: Path) -> None:
        """Continue from a saved state."""
        saved = torch.load(file, weights_only=True)
        for part, state in zip(self.parts(), saved["parts"], strict=True):
            part.load_state_dict(state)
        self.step, self.minutes = saved["step"], saved["minutes"]


def train(
    state: TrainState,
    encoder: PolicyEncoder,
    stream: Iterator[PolicyBatch],
    plan: PretrainPlan,
    every: int,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """Train as planned; every `every` steps, `report` gets the mean losses since the last call."""
    model, schedules = state.model, state.optimizers
    parameters = [*model.parameters(), *state.head.parameters()]
    losses: dict[str, list[float]] = {}
    while state.step < plan.steps:
        model.train()
        batch = next(stream)
        for optimizer, peak in schedules:
            optimizer.param_groups[0]["lr"] = peak * learning_rate(state.step, plan)
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss, cells = train_losses(model, state.head, batch, encoder.pad_of[batch.media])
        (loss + plan.patch_weight * cells).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, _ in schedules:
            optimizer.step()
        losses.setdefault(batch.media, []).append(loss.item())
        losses.setdefault(f"{batch.media}_patches", []).append(cells.item())
        state.step += 1
        if state.step % every == 0 or state.step == plan.steps:
            report(state.step, {k: round(float(np.mean(v)), 4) for k, v in losses.items()})
            losses = {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save checkpoints on the way and write the model card; started again, continue."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=PretrainPlan.steps)
    parser.add_argument("--seed", type=int, default=PretrainPlan.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=2000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plan = replace(PretrainPlan(), steps=options.steps, seed=options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, PolicySize(), plan.seed)
    fast_forward(model)
    head = PatchHeads(model)
    state = TrainState(model, head, optimizers(model, head, plan))
    file = options.out.with_name(options.out.name + ".state")
    if file.is_file():
        state.load(file)
    encoder = PolicyEncoder(tokenizer)
    held_out = {name: make_clips([plan.seed, 1], 256, name) for name in PRESET_NAMES}
    prompts = load_prompts("compact")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f} M parameters, step {state.step} of {plan.steps}", flush=True)
    started = time.monotonic() - 60 * state.minutes

    def report(step: int, losses: dict[str, float]) -> None:
        state.minutes = round((time.monotonic() - started) / 60, 1)
        line: dict[str, object] = {"step": step, "minutes": state.minutes, **losses}
        if step % options.save_every == 0 or step == plan.steps:
            state.save(file)
            scores = {n: figures(model, encoder, c, prompts) for n, c in held_out.items()}
            save_policy(model, tokenizer, options.out)
            card = model_card(plan, step, state.minutes, size, scores)
            (options.out / "README.md").write_text(card, encoding="utf-8")
            line |= scores
        print(json.dumps(line), flush=True)

    buckets = Buckets(encoder, plan, state.step)
    loader = torch.utils.data.DataLoader(buckets, batch_size=None, num_workers=1, prefetch_factor=4)
    train(state, encoder, iter(loader), plan, every=50, report=report)


def model_card(
    plan: PretrainPlan,
    step: int,
    minutes: float,
    size: float,
    scores: Mapping[str, Mapping[str, float]],
) -> str:
    """Return the README.md of the checkpoint's folder."""
    names = list(next(iter(scores.values())))
    rows = "\n".join(
        f"| {name} | {' | '.join(f'{found[name]:.3f}' for found in scores.values())} |"
        for name in names
    )
    columns = " | ".join(scores)
    rule = " | ".join("---" for _ in scores)
    state = "" if step == plan.steps else f" (an early checkpoint: step {step} of {plan.steps})"
    return f"""# tiny-qwen2.5-vl

A Qwen2.5-VL of {size:.2f} M parameters with its own tokenizer, chat template and processor,
trained from scratch on procedural clips{state}. It is the base model of the laptop recipe and of
the tests: the architecture is the production one, with smaller sizes. It only knows the coloured
shapes of the toy corpora's presets `lattice` and `fleeting`; it is of no use for real video.

## Command

    python -m rcot_rl.tiny.policy_train --out DIR --steps {plan.steps} --seed {plan.seed}

{step} steps of {plan.batch} samples, {minutes:.0f} minutes (wall clock) on a machine with
{os.cpu_count()} CPU cores. One core trains, a third of another draws the clips: half of each
preset, never one twice, from
`numpy.random.default_rng([{STREAM}, {plan.seed}, 2, n])`, a stream that no corpus uses. Interrupted
and started again, the command continues from its last checkpoint. Numbers may differ in the last
digits on another processor.

It was trained to see and describe: to describe a clip, to say when each shape is visible, to name
the best frame of a named shape, to list, ground, compare and count shapes; lists can be restricted
by colour, shape, what the shapes are not, or place in the description. It has not seen a query like
`all red shapes` or `the shape that appears last`, and neither the AKS nor the KTG prompt: CoT-SFT
and GRPO teach those.

Images are 112 x 112 (16 tokens), videos 8 frames of 112 x 112 (64 tokens). Give every video
`fps = 2` in its metadata, whatever its real rate is: it determines the temporal positions, and the
policy knows no others.

## Figures

On 256 new clips of each preset (`[{STREAM}, {plan.seed}, 1]`), greedy:

| figure | {columns} |
| --- | {rule} |
{rows}

`vdg_exact`: the whole description is correct. `times_exact`: first and last frame of every shape.
`kfg_visible`: the frame chosen for a named shape shows it (`kfg_visible_chance`: a random frame
does); `kfg_exact`: it is the keyframe. `detection_iou`: mean IoU of the boxes in "List the
shapes.", over visible shapes; `presence`: hidden or not, per shape; `scene_exact`: the whole list
is correct to the pixel.
"""


if __name__ == "__main__":
    main()
