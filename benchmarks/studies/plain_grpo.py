"""Search learning rates and step counts for the tiny policy: LoRA SFT, then GRPO, without verl.

`python benchmarks/studies/plain_grpo.py --model DIR` takes minutes. It chose the settings of
`recipes/laptop.yaml`; its numbers are not results of the project, and no run uses it. The rewards
are the recipe's; held-out prompts are freshly drawn and compared in pairs. Left out: micro-batches,
several updates per rollout, and everything else that verl does for scale.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from rcot_rl.protocol.prompts import Prompts, load_prompts
from rcot_rl.tiny.policy_data import (
    STREAM,
    PolicyClip,
    boxes_text,
    keyframe,
    make_clips,
    scene_text,
    target_text,
)
from rcot_rl.tiny.policy_eval import generate, texts
from rcot_rl.tiny.policy_model import IMAGE_CANVAS, PolicyBatch, PolicyEncoder, hidden_states
from rcot_rl.tiny.policy_train import loss_of
from reward_fns import Reward, load_reward


@dataclass(frozen=True)
class Question:
    """One AKS or KTG question with its templated trace and ground truth."""

    task: str
    prompt: str
    response: str
    truth: object
    frames: np.ndarray


def make_rows(seed: Sequence[int], task: str, count: int, prompts: Prompts) -> list[Question]:
    """Draw `count` questions, with the frames that the shards' plan would choose."""
    rng = np.random.default_rng([STREAM, *seed, 9])
    rows: list[Question] = []
    while len(rows) < count:
        clips = make_clips([*seed, len(rows)], 64)
        drawn = (row(rng, clip, task, prompts) for clip in clips)
        rows += [r for r in drawn if r is not None]
    return rows[:count]


def row(rng: np.random.Generator, clip: PolicyClip, task: str, prompts: Prompts) -> Question | None:
    """Draw a question about a clip; None if the drawn query has none."""
    query = clip.queries[rng.integers(len(clip.queries))]
    areas = [clip.union(query, t) for t in range(len(clip.frames))]
    if max(areas) == 0:
        return None
    frame = keyframe(clip, query)
    option = "AB"[rng.integers(2)] if task == "aks" else ""
    if option == "B":
        empty = [t for t, area in enumerate(areas) if area == 0]
        if not empty:
            return None
        frame = int(rng.choice(empty))
    named = frame if task == "aks" else None
    think = f"{scene_text(clip, frame)} {target_text(clip, query, named)}"
    boxes = boxes_text(clip, query.targets, frame)
    answer, truth = (option, option) if task == "aks" else (boxes, json.loads(boxes))
    template = prompts.aks if task == "aks" else prompts.ktg
    response = f"<think>{think}</think>\n<answer>{answer}</answer>"
    text = template(clip.description, query.text)
    return Question(task, text, response, truth, clip.frames[frame : frame + 1])


def stack(rows: Sequence[Question]) -> np.ndarray:
    """Return the frames of rows, uint8 [B, 1, S, S, 3] RGB."""
    return np.stack([r.frames for r in rows])


def draws(
    rng: np.random.Generator, rows: Sequence[Question], size: int
) -> Iterator[list[Question]]:
    """Yield endless shuffled batches."""
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - size + 1, size):
            yield [rows[i] for i in order[start : start + size]]


def lora_sft(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: PolicyEncoder,
    rows: Sequence[Question],
    steps: int,
    rate: float,
    rank: int,
) -> Qwen2_5_VLForConditionalGeneration:
    """Train LoRA on every linear layer of the language model and merge it."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
    )
    tuned = get_peft_model(model, config)
    inner: Any = tuned.base_model.model
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    stream = draws(np.random.default_rng([STREAM, 5]), rows, 32)
    started = time.monotonic()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 10)
        optimizer.param_groups[0]["lr"] = (
            rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        )
        part = next(stream)
        batch = encoder.batch([r.prompt for r in part], [r.response for r in part], stack(part))
        loss = loss_of(inner, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 25 == 0:
            seconds = time.monotonic() - started
            print(f"sft {step + 1} loss {loss.item():.3f} {seconds:.0f} s", flush=True)
    merged: Any = tuned.merge_and_unload()
    return merged


def log_probs(
    model: Qwen2_5_VLForConditionalGeneration, batch: PolicyBatch, tokens: torch.Tensor, count: int
) -> torch.Tensor:
    """Return log-probabilities [B * count, L] of sampled tokens."""
    width = batch.ids.shape[1]
    ids = torch.cat([batch.ids.repeat_interleave(count, 0), tokens], 1)
    mask = torch.cat([batch.mask.repeat_interleave(count, 0), torch.ones_like(tokens)], 1)
    prompt = batch.positions.repeat_interleave(count, 1)
    rest = prompt[:, :, -1:] + 1 + torch.arange(tokens.shape[1])
    tiled = batch.pixels.view(len(batch.ids), -1, batch.pixels.shape[-1])
    whole = replace(
        batch,
        ids=ids,
        mask=mask,
        positions=torch.cat([prompt, rest], 2),
        pixels=tiled.repeat_interleave(count, 0).flatten(0, 1),
        grid=batch.grid.repeat_interleave(count, 0),
    )
    hidden = hidden_states(model, whole, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, width - 1 : -1])
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@dataclass(frozen=True)
class GrpoPlan:
    """GRPO settings that the search varies."""

    steps: int = 60
    rate: float = 1e-4
    prompts: int = 16
    count: int = 8
    kl: float = 0.01
    clip: float = 0.2
    max_new: int = 128


def grpo(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: PolicyEncoder,
    rows: Sequence[Question],
    reward: Reward,
    plan: GrpoPlan,
    seed: int,
) -> None:
    """Train in place with GRPO: one update per rollout, low-variance KL, token mean."""
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.rate, betas=(0.9, 0.999), weight_decay=0.01
    )
    torch.manual_seed(seed)
    stream = draws(np.random.default_rng([STREAM, seed, 6]), rows, plan.prompts)
    started = time.monotonic()
    recent: list[tuple[float, float, float]] = []
    for step in range(plan.steps):
        part = next(stream)
        batch = encoder.batch([r.prompt for r in part], None, stack(part))
        rollout = generate(
            model, encoder, batch, count=plan.count, temperature=1.0, max_new=plan.max_new
        )
        responses = texts(encoder, rollout)
        score = torch.tensor(
            [reward.score(r, part[i // plan.count].truth).reward for i, r in enumerate(responses)]
        ).view(-1, plan.count)
        spread = score.std(1, keepdim=True)
        advantage = ((score - score.mean(1, keepdim=True)) / (spread + 1e-6)).view(-1, 1)
        kept = torch.arange(rollout.tokens.shape[1])[None] < rollout.lengths[:, None]
        with torch.no_grad():
            before = log_probs(reference, batch, rollout.tokens, plan.count)
        now = log_probs(model, batch, rollout.tokens, plan.count)
        ratio = (now - now.detach()).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(1 - plan.clip, 1 + plan.clip) * advantage)
        gap = (before - now).clamp(-20, 20)
        penalty = (gap.exp() - gap - 1).clamp(-10, 10)
        loss = ((plan.kl * penalty - gain) * kept).sum() / kept.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        dead = float((spread < 1e-6).float().mean())
        recent.append((float(score.mean()), dead, float((penalty * kept).sum() / kept.sum())))
        if (step + 1) % 10 == 0:
            mean, zero, kl = np.mean(recent[-10:], 0)
            seconds = time.monotonic() - started
            print(
                f"grpo {step + 1} reward {mean:.3f} dead {zero:.2f} kl {kl:.4f} {seconds:.0f} s",
                flush=True,
            )


def held_out(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: PolicyEncoder,
    rows: Sequence[Question],
    reward: Reward,
) -> dict[str, np.ndarray]:
    """Return rewards and components per row: greedy, and means of four samples."""
    model.eval()
    torch.manual_seed(0)
    out: dict[str, list[float]] = {}
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        batch = encoder.batch([r.prompt for r in part], None, stack(part))
        for mode, count, temperature in (("greedy", 1, 0.0), ("sampled", 4, 1.0)):
            rollout = generate(model, encoder, batch, count=count, temperature=temperature)
            responses = texts(encoder, rollout)
            for i, question in enumerate(part):
                group = responses[i * count : (i + 1) * count]
                scores = [reward.score(r, question.truth) for r in group]
                out.setdefault(mode, []).append(float(np.mean([s.reward for s in scores])))
                for name in scores[0].components:
                    value = float(np.mean([s.components[name] for s in scores]))
                    out.setdefault(f"{mode}_{name}", []).append(value)
    return {k: np.array(v) for k, v in out.items()}


def show(label: str, rewards: dict[str, np.ndarray]) -> None:
    """Print one line of means."""
    values = "  ".join(f"{k} {v.mean():.3f}" for k, v in rewards.items())
    print(f"{label}: {values}", flush=True)


def compare(label: str, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
    """Print paired differences with their standard errors."""
    for mode in ("greedy", "sampled"):
        gap = after[mode] - before[mode]
        error = gap.std() / math.sqrt(len(gap))
        print(f"{label} {mode}: {gap.mean():+.3f} +- {error:.3f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run SFT on both tasks, then GRPO on the named ones, and compare each with SFT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sft-steps", type=int, default=220)
    parser.add_argument("--sft-rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sft-rows", type=int, default=2000)
    parser.add_argument("--tasks", default="aks,ktg")
    parser.add_argument("--grpo-steps", type=int, default=60)
    parser.add_argument("--grpo-rate", type=float, default=1e-4)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-sft", type=Path)
    parser.add_argument("--skip-sft", action="store_true", help="--model is an SFT checkpoint")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    encoder, prompts = PolicyEncoder(tokenizer), load_prompts("compact")
    tasks = options.tasks.split(",")
    fresh = {t: make_rows([7, ord(t[0])], t, options.held_out, prompts) for t in tasks}
    rewards = {t: load_reward(t, canvas=IMAGE_CANVAS) for t in tasks}
    if not options.skip_sft:
        half = options.sft_rows // 2
        rows = [r for t in ("aks", "ktg") for r in make_rows([8, ord(t[0])], t, half, prompts)]
        model = lora_sft(model, encoder, rows, options.sft_steps, options.sft_rate, options.rank)
        if options.save_sft:
            model.save_pretrained(options.save_sft)
            tokenizer.save_pretrained(options.save_sft)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for task in tasks:
        start = held_out(model, encoder, fresh[task], rewards[task])
        show(f"{task} sft", start)
        if options.grpo_steps:
            tuned = copy.deepcopy(model)
            pool = make_rows([9, ord(task[0]), options.seed], task, 1000, prompts)
            plan = GrpoPlan(steps=options.grpo_steps, rate=options.grpo_rate)
            grpo(tuned, encoder, pool, rewards[task], plan, options.seed)
            end = held_out(tuned, encoder, fresh[task], rewards[task])
            show(f"{task} grpo", end)
            compare(task, start, end)


if __name__ == "__main__":
    main()
