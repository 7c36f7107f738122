"""Trains the tiny SAM2 on generated clips: `python -m rcot_rl.tiny.sam2_train --out DIR`.

Progressively, as weights do not depend on the image side: single frames at 64 px, single frames at
128 px, then clips of five frames at 128 px with the memory in the loop. Prompts are a jittered box
and a positive point on the clip's first frame, as KTG gives them (the paper's frozen SAM2 receives
exactly these). Loss: 4 BCE + Dice on masks of visible objects, 0.5 BCE on the visibility score.

Left out: interactive corrections on later frames and mask prompts. `forward` of the transformers
model runs without gradients, so the step below drives its sub-modules in the same order.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import get_1d_sine_pe

from rcot_rl.inference.sam2 import Sam2Segmenter, preprocess
from rcot_rl.tiny.sam2_card import Made, judge, write_card
from rcot_rl.tiny.sam2_data import (
    SIDE,
    TRAIN_STREAM,
    Clip,
    Stage,
    Track,
    draw_clip,
    draw_prompt,
    sample_batch,
)
from rcot_rl.tiny.sam2_model import HIDDEN, MEMORY_CHANNELS, build_tiny_sam2, save_half

POOL = 240
SAVE_EVERY = 240.0


STAGES = (
    Stage("64 px frames", 0.10, 64, 8, 1, 3, 5e-4, 0.0),
    Stage("128 px frames", 0.10, 128, 8, 1, 3, 4e-4, 0.0),
    Stage("128 px clips", 0.80, 128, 3, 5, 3, 5e-4, 0.5),
)


class ClipForward:
    """SAM2's frame-by-frame pass over a batch of tracks, with gradients.

    Mirrors what the session of `Sam2VideoModel` does: the first frame is the prompted one and stays
    in memory, then the last three frames and the last object pointers.
    """

    def __init__(self, model: Sam2VideoModel, clips: list[Clip], tracks: list[Track]) -> None:
        self.model = model
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
        self, boxes: np.ndarray, points: np.ndarray, mode: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Frame 0's embeddings of boxes [N, 4] and points [N, 2]; mode: box, point or both."""
        corners = torch.from_numpy(boxes).view(len(boxes), 1, 2, 2)
        clicks = torch.from_numpy(points).view(len(points), 1, 1, 2)
        if mode == "box":
            where, kinds = corners, [2, 3]
        elif mode == "point":
            where, kinds = clicks, [1]
        else:
            where, kinds = torch.cat([corners, clicks], 2), [2, 3, 1]
        labels = torch.tensor(kinds, dtype=torch.int32).view(1, 1, -1).expand(len(boxes), 1, -1)
        return self.model.prompt_encoder(where, labels, None, None)

    def frame(
        self, t: int, prompt: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits [N, 1, S, S] and visibility logits [N] of frame t."""
        model, n = self.model, len(self.tracks)
        now = [level[:, :, t] for level in self.levels]
        sizes = model.backbone_feature_sizes
        fine = [now[i].permute(1, 2, 0).unflatten(2, tuple(sizes[i])) for i in range(2)]
        if t == 0:
            embedding = (now[-1] + model.no_memory_embedding).permute(1, 2, 0)
            sparse, dense = prompt
        else:
            embedding = self._attend(t, now[-1]).transpose(1, 2)
            nowhere = torch.zeros(n, 1, 1, 2), -torch.ones(n, 1, 1, dtype=torch.int32)
            sparse, dense = model.prompt_encoder(*nowhere, None, None)
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
        seen = (score > 0).float().view(n, 1)
        self.pointers.append(seen * pointer + (1 - seen) * model.no_object_pointer)
        logits = F.interpolate(
            masks[:, 0], size=(model.image_size,) * 2, mode="bilinear", align_corners=False
        )
        return logits, score.flatten()

    def remember(self, t: int, logits: torch.Tensor, score: torch.Tensor) -> None:
        """Writes frame t's mask logits [N, 1, S, S] into the memory.

        The prompted frame's mask is written as 0 or 1, as at inference; in training mode the model
        itself would not do so.
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
        when = model.memory_temporal_positional_encoding
        used = [(0, when[-1])]
        for back in range(model.num_maskmem - 1, 0, -1):
            if t - back >= 1:
                used.append((t - back, when[back - 1]))
        memory = [self.memory[u][0] for u, _ in used]
        places = [self.memory[u][1] + shift for u, shift in used]
        most = model.config.max_object_pointers_in_encoder
        frames = [0, *(t - back for back in range(1, most) if t - back >= 1)]
        pieces = HIDDEN // MEMORY_CHANNELS
        pointers = torch.stack([self.pointers[f] for f in frames])
        pointers = pointers.reshape(len(frames), n, pieces, MEMORY_CHANNELS)
        pointers = pointers.permute(0, 2, 1, 3).flatten(0, 1)
        ages = torch.tensor([t - f for f in frames], dtype=torch.float32) / (most - 1)
        age_code = model.temporal_positional_encoding_projection_layer(
            get_1d_sine_pe(ages, dim=HIDDEN)
        )
        age_code = age_code.unsqueeze(1).expand(-1, n, -1).repeat_interleave(pieces, 0)
        return model.memory_attention(
            current_vision_features=coarse,
            current_vision_position_embeddings=self.position,
            memory=torch.cat([*memory, pointers]),
            memory_posision_embeddings=torch.cat([*places, age_code]),
            num_object_pointer_tokens=len(pointers),
        )[0]


def mask_loss(logits: torch.Tensor, truth: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """logits, truth: [N, 1, S, S]; score: [N]. Masks count only where something is visible."""
    visible = (truth.flatten(1).sum(1) > 0).float()
    count = visible.sum().clamp(min=1)
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").flatten(1).mean(1)
    p = logits.sigmoid()
    overlap = (p * truth).flatten(1).sum(1)
    dice = 1 - (2 * overlap + 1) / ((p + truth).flatten(1).sum(1) + 1)
    masks = ((4 * bce + dice) * visible).sum() / count
    return masks + 0.5 * F.binary_cross_entropy_with_logits(score, visible)


def train_step(
    model: Sam2VideoModel, rng: np.random.Generator, pool: list[Clip], stage: Stage, teacher: float
) -> torch.Tensor:
    """The mean loss per frame of a fresh batch, with its graph: scalar."""
    clips, tracks = sample_batch(rng, pool, stage)
    boxes, points = zip(*(draw_prompt(rng, t.masks[0]) for t in tracks), strict=True)
    truth = torch.from_numpy(np.stack([t.masks for t in tracks]).astype(np.float32))
    run = ClipForward(model, clips, tracks)
    mode = str(rng.choice(["both", "box", "point"], p=[0.84, 0.08, 0.08]))
    prompt = run.prompt(np.stack(boxes), np.stack(points), mode)
    losses = []
    for t in range(stage.frames):
        logits, score = run.frame(t, prompt)
        losses.append(mask_loss(logits, truth[:, t : t + 1], score))
        if t + 1 < stage.frames:
            written = truth[:, t : t + 1] * 20 - 10 if rng.random() < teacher else logits
            run.remember(t, written, score)
    return torch.stack(losses).mean()


class Average:
    """An exponential moving average of the weights: what is saved and judged."""

    def __init__(self, model: Sam2VideoModel) -> None:
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Sam2VideoModel) -> None:
        self.updates += 1
        keep = min(0.99, self.updates / (self.updates + 9))
        for key, value in model.state_dict().items():
            self.weights[key].lerp_(value, 1 - keep)


def train(out: Path, minutes: float, seed: int, start_from: Path | None = None) -> Made:
    """Trains for `minutes` of CPU time and writes float16 checkpoints into `out` on the way.

    While it learns on clips one is written every four minutes, and one at the end, each with a
    model card that has no figures yet. The same seed gives the same run up to where the clock cuts
    the stages. start_from: a checkpoint's folder; with it, all the time goes to clips. Returns
    what was done, for the card with figures.
    Raises InputError when `start_from` holds no tiny SAM2.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rng = np.random.default_rng([TRAIN_STREAM, seed])
    began = saved = time.process_time()
    pool = [draw_clip(rng) for _ in range(POOL)]
    print(f"{POOL} clips drawn in {time.process_time() - began:.0f} CPU s", flush=True)
    stages, weights = STAGES, None
    if start_from is not None:
        stages = (replace(STAGES[-1], share=1.0, teacher=0.2),)
        weights = Sam2Segmenter.load(start_from).model.state_dict()
    steps = 0

    def made() -> Made:
        spent = (time.process_time() - began) / 60
        parameters = sum(p.numel() for p in model.parameters())
        return Made(minutes, seed, start_from, steps, spent, parameters)

    def save() -> None:
        save_half(average.weights, SIDE, out)
        write_card(out, made())

    for stage in stages:
        model = build_tiny_sam2(stage.side, seed)
        if weights is not None:
            model.load_state_dict(weights)
        model.train()
        average = Average(model)
        optimiser = torch.optim.AdamW(model.parameters(), lr=stage.lr, weight_decay=0.01)
        start, budget, recent = time.process_time(), stage.share * minutes * 60, []
        floor = 0.03 if stage is stages[-1] else 0.3
        step = 0
        while (done := (time.process_time() - start) / budget) < 1:
            step += 1
            steps += 1
            scale = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
            for group in optimiser.param_groups:
                group["lr"] = stage.lr * min(1, step / 40) * scale
            loss = train_step(model, rng, pool, stage, stage.teacher * (1 - done))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            average.update(model)
            pool[rng.integers(POOL)] = draw_clip(rng)
            recent.append(loss.item())
            if step % 25 == 0:
                spent = time.process_time() - began
                print(f"{stage.name} step {step} {spent:.0f}s {np.mean(recent):.3f}", flush=True)
                recent = []
            if stage is stages[-1] and time.process_time() - saved > SAVE_EVERY:
                save()
                saved = time.process_time()
        weights = average.weights
    save()
    print(f"{steps} steps, {(time.process_time() - began) / 60:.1f} CPU minutes", flush=True)
    return made()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=25.0, help="CPU minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", type=Path, dest="start_from", help="go on from this checkpoint")
    args = parser.parse_args()
    run = train(args.out, args.minutes, args.seed, args.start_from)
    write_card(args.out, run, judge(args.out))


if __name__ == "__main__":
    main()
