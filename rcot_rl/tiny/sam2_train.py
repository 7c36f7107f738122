"""Train the tiny SAM2 on generated clips: `python -m rcot_rl.tiny.sam2_train --out DIR`.

Three stages, since weights do not depend on the image side: single frames at 64 px, single frames
at 128 px, then clips of five frames at 128 px with the memory. Prompts are a jittered box and a
positive point in the clip's first frame, which is what KTG gives the paper's frozen SAM2. Loss:
4 BCE + Dice on masks of visible objects, 0.5 BCE on the visibility score.

Left out: corrections in later frames, and mask prompts. `forward` of the transformers model runs
without gradients, so `ClipForward` calls its submodules in the same order.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import get_1d_sine_pe

from rcot_rl.segmentation.sam2 import BOX_FIRST, BOX_SECOND, POSITIVE, preprocess
from rcot_rl.tiny.sam2_card import TrainingRun, judge, write_card
from rcot_rl.tiny.sam2_data import (
    TRAIN_STREAM,
    LabelledClip,
    Sam2Stage,
    Track,
    draw_clip,
    draw_prompt,
    sample_batch,
)
from rcot_rl.tiny.sam2_model import HIDDEN, MEMORY_CHANNELS, build_tiny_sam2, save_half

POOL = 240
"""Clips kept in memory; each step replaces one."""

PromptKind = Literal["both", "box", "point"]

STAGES: tuple[Sam2Stage, ...] = (
    Sam2Stage("64 px frames", 800, 64, 8, 1, 3, 5e-4, 0.0),
    Sam2Stage("128 px frames", 500, 128, 8, 1, 3, 4e-4, 0.0),
    Sam2Stage("128 px clips", 3000, 128, 3, 5, 3, 5e-4, 0.5),
)


class ClipForward:
    """SAM2's frame-by-frame pass over a batch of tracks, with gradients.

    Does the same as the session of `Sam2VideoModel`: the memory keeps the first frame, which is the
    prompted one, the last three frames and the last object pointers.
    """

    def __init__(
        self, model: Sam2VideoModel, clips: list[LabelledClip], tracks: list[Track]
    ) -> None:
        self.model: Any = model
        self.tracks = tracks
        length, side = clips[0].frames.shape[:2]
        pixels = preprocess(np.concatenate([c.frames for c in clips]), side)
        vision = model.get_image_features(pixels, return_dict=True)
        shape = (len(clips), length)
        owner = torch.tensor([t.clip for t in tracks])
        # each [cells, tracks, T, channels]
        self.levels = [f.unflatten(1, shape)[:, owner] for f in vision.fpn_hidden_states]
        coarse = vision.fpn_position_encoding[-1]
        self.position = coarse[:, :1].expand(-1, len(tracks), -1)
        self.memory: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.pointers: list[torch.Tensor] = []

    def prompt(
        self, boxes: np.ndarray, points: np.ndarray, kind: PromptKind
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed boxes [N, 4] and points [N, 2] of frame 0, or only one of them."""
        corners = torch.from_numpy(boxes).view(len(boxes), 1, 2, 2)
        clicks = torch.from_numpy(points).view(len(points), 1, 1, 2)
        if kind == "box":
            spots, labels = corners, [BOX_FIRST, BOX_SECOND]
        elif kind == "point":
            spots, labels = clicks, [POSITIVE]
        else:
            spots = torch.cat([corners, clicks], 2)
            labels = [BOX_FIRST, BOX_SECOND, POSITIVE]
        each = torch.tensor(labels, dtype=torch.int32).view(1, 1, -1).expand(len(boxes), 1, -1)
        return self.model.prompt_encoder(spots, each, None, None)

    def frame(
        self, t: int, prompt: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mask logits [N, 1, S, S] and visibility logits [N] of frame t."""
        model, n = self.model, len(self.tracks)
        levels = [level[:, :, t] for level in self.levels]
        sizes = model.backbone_feature_sizes
        fine = [levels[i].permute(1, 2, 0).unflatten(2, tuple(sizes[i])) for i in range(2)]
        if t == 0:
            embedding = (levels[-1] + model.no_memory_embedding).permute(1, 2, 0)
            sparse, dense = prompt
        else:
            embedding = self._attend(t, levels[-1]).transpose(1, 2)
            no_prompt = torch.zeros(n, 1, 1, 2), -torch.ones(n, 1, 1, dtype=torch.int32)
            sparse, dense = model.prompt_encoder(*no_prompt, None, None)
        masks, _, tokens, score = model.mask_decoder(
            image_embeddings=embedding.unflatten(2, tuple(sizes[-1])),
            image_positional_embeddings=model.get_image_wide_positional_embeddings().expand(
                n, -1, -1, -1
            ),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            high_resolution_features=fine,
        )
        pointer = model.object_pointer_proj(tokens[:, 0, 0])
        visible = (score > 0).float().view(n, 1)
        self.pointers.append(visible * pointer + (1 - visible) * model.no_object_pointer)
        logits = F.interpolate(
            masks[:, 0], size=(model.image_size,) * 2, mode="bilinear", align_corners=False
        )
        return logits, score.flatten()

    def remember(self, t: int, logits: torch.Tensor, score: torch.Tensor) -> None:
        """Write frame t's mask logits [N, 1, S, S] into the memory.

        The mask of the prompted frame is written as 0 or 1, as at inference; the model does not do
        this in training mode.
        """
        coarse = self.levels[-1][:, :, t]
        if t == 0:
            logits = (logits > 0).float() * 20 - 10
        features, position = self.model._encode_new_memory(
            coarse, logits, score.view(-1, 1, 1), is_mask_from_pts=False
        )
        self.memory.append((features.float(), position.float()))

    def _attend(self, t: int, coarse: torch.Tensor) -> torch.Tensor:
        model, n = self.model, len(self.tracks)
        frame_codes = model.memory_temporal_positional_encoding
        used = [(0, frame_codes[-1])]
        for back in range(model.num_maskmem - 1, 0, -1):
            if t - back >= 1:
                used.append((t - back, frame_codes[back - 1]))
        memory = [self.memory[u][0] for u, _ in used]
        positions = [self.memory[u][1] + code for u, code in used]
        limit = model.config.max_object_pointers_in_encoder
        frames = [0, *(t - back for back in range(1, limit) if t - back >= 1)]
        pieces = HIDDEN // MEMORY_CHANNELS
        pointers = torch.stack([self.pointers[f] for f in frames])
        pointers = pointers.reshape(len(frames), n, pieces, MEMORY_CHANNELS)
        pointers = pointers.permute(0, 2, 1, 3).flatten(0, 1)
        ages = torch.tensor([t - f for f in frames], dtype=torch.float32) / (limit - 1)
        age_code = model.temporal_positional_encoding_projection_layer(
            get_1d_sine_pe(ages, dim=HIDDEN)
        )
        age_code = age_code.unsqueeze(1).expand(-1, n, -1).repeat_interleave(pieces, 0)
        return model.memory_attention(
            current_vision_features=coarse,
            current_vision_position_embeddings=self.position,
            memory=torch.cat([*memory, pointers]),
            memory_posision_embeddings=torch.cat([*positions, age_code]),
            num_object_pointer_tokens=len(pointers),
        )[0]


def mask_loss(logits: torch.Tensor, truth: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Return the scalar loss; masks count only for visible objects.

    Args:
        logits: Mask logits, [N, 1, S, S].
        truth: True masks, float [N, 1, S, S].
        score: Visibility logits, [N].
    """
    visible = (truth.flatten(1).sum(1) > 0).float()
    count = visible.sum().clamp(min=1)
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").flatten(1).mean(1)
    p = logits.sigmoid()
    overlap = (p * truth).flatten(1).sum(1)
    dice = 1 - (2 * overlap + 1) / ((p + truth).flatten(1).sum(1) + 1)
    masks = ((4 * bce + dice) * visible).sum() / count
    return masks + 0.5 * F.binary_cross_entropy_with_logits(score, visible)


def train_step(
    model: Sam2VideoModel,
    rng: np.random.Generator,
    pool: list[LabelledClip],
    stage: Sam2Stage,
    teacher: float,
) -> torch.Tensor:
    """Return the mean loss per frame of a new batch, a scalar with its graph."""
    clips, tracks = sample_batch(rng, pool, stage)
    boxes, points = zip(*(draw_prompt(rng, t.masks[0]) for t in tracks), strict=True)
    truth = torch.from_numpy(np.stack([t.masks for t in tracks]).astype(np.float32))
    run = ClipForward(model, clips, tracks)
    kinds = get_args(PromptKind)
    kind = kinds[rng.choice(len(kinds), p=[0.84, 0.08, 0.08])]
    prompt = run.prompt(np.stack(boxes), np.stack(points), kind)
    losses = []
    for t in range(stage.frames):
        logits, score = run.frame(t, prompt)
        losses.append(mask_loss(logits, truth[:, t : t + 1], score))
        if t + 1 < stage.frames:
            written = truth[:, t : t + 1] * 20 - 10 if rng.random() < teacher else logits
            run.remember(t, written, score)
    return torch.stack(losses).mean()


class WeightAverage:
    """An exponential moving average of the weights, which is saved and evaluated."""

    def __init__(self, model: Sam2VideoModel) -> None:
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Sam2VideoModel) -> None:
        """Add the weights of one step."""
        self.updates += 1
        keep = min(0.99, self.updates / (self.updates + 9))
        for key, value in model.state_dict().items():
            self.weights[key].lerp_(value, 1 - keep)


def train(out: Path, seed: int, stages: Sequence[Sam2Stage] = STAGES) -> TrainingRun:
    """Train and write a float16 checkpoint into `out`, with a model card without figures."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rng = np.random.default_rng([TRAIN_STREAM, seed])
    started = time.process_time()
    pool = [draw_clip(rng) for _ in range(POOL)]
    print(f"{POOL} clips drawn in {time.process_time() - started:.0f} CPU s", flush=True)
    weights = None
    for stage in stages:
        model = build_tiny_sam2(stage.side, seed)
        if weights is not None:
            model.load_state_dict(weights)
        model.train()
        average = WeightAverage(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, weight_decay=0.01)
        recent: list[float] = []
        floor = 0.03 if stage is stages[-1] else 0.3
        for step in range(stage.steps):
            done = step / stage.steps
            scale = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = stage.lr * min(1, (step + 1) / 40) * scale
            loss = train_step(model, rng, pool, stage, stage.teacher * (1 - done))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update(model)
            pool[rng.integers(POOL)] = draw_clip(rng)
            recent.append(loss.item())
            if (step + 1) % 25 == 0:
                spent = time.process_time() - started
                print(f"{stage.name} {step + 1} {spent:.0f}s {np.mean(recent):.3f}", flush=True)
                recent = []
        weights = average.weights
    save_half(average.weights, stages[-1].side, out)
    run = TrainingRun(
        seed=seed,
        steps=tuple(stage.steps for stage in stages),
        cpu_minutes=(time.process_time() - started) / 60,
        parameters=sum(p.numel() for p in model.parameters()),
    )
    write_card(out, run)
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate and write the model card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    run = train(options.out, options.seed)
    write_card(options.out, run, judge(options.out))


if __name__ == "__main__":
    main()
