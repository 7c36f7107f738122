"""Generation with the tiny policy in plain PyTorch, and the figures of its model card.

`generate` encodes each prompt once and draws n samples. The pipeline does not use it; its engine is
vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from data_pipelines.toy.queries import ToyQuery
from rcot_rl.protocol.prompts import Prompts
from rcot_rl.tiny.policy_data import PolicyClip, keyframe, scene_text, times_text
from rcot_rl.tiny.policy_model import PolicyBatch, PolicyEncoder, hidden_states
from reward_fns.components.hungarian_match import box_iou


@dataclass(frozen=True)
class SampledResponses:
    """Sampled responses."""

    tokens: torch.Tensor
    """int64 [B * n, L]"""
    lengths: torch.Tensor
    """int64 [B * n], including the end of turn"""
    ended: torch.Tensor
    """bool [B * n]: the response has an end of turn."""


@torch.no_grad()
def generate(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: PolicyEncoder,
    batch: PolicyBatch,
    *,
    count: int = 1,
    temperature: float = 0.0,
    max_new: int = 128,
) -> SampledResponses:
    """Sample `count` answers to each prompt of a left-padded batch; temperature 0 is greedy."""
    output = hidden_states(model, batch, use_cache=True)
    cache, hidden = output.past_key_values, output.last_hidden_state[:, -1]
    if count > 1:
        cache.batch_repeat_interleave(count)
        hidden = hidden.repeat_interleave(count, 0)
    mask = batch.mask.repeat_interleave(count, 0)
    positions = batch.positions[:, :, -1:].repeat_interleave(count, 1)
    ended = torch.zeros(len(mask), dtype=torch.bool)
    lengths = torch.zeros(len(mask), dtype=torch.long)
    tokens = []
    for _ in range(max_new):
        # a placeholder without an image breaks the next forward pass; engines ban them too
        logits = model.lm_head(hidden).index_fill(1, encoder.placeholders, -torch.inf)
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        else:
            chosen = logits.argmax(-1)
        chosen = torch.where(ended, encoder.pad, chosen)
        tokens.append(chosen)
        lengths += ~ended
        ended = ended | (chosen == encoder.eos)
        if ended.all():
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions + 1
        hidden = model.model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    return SampledResponses(torch.stack(tokens, 1), lengths, ended)


def texts(encoder: PolicyEncoder, rollout: SampledResponses) -> list[str]:
    """Decode responses, without the end of turn."""
    stop = rollout.lengths - rollout.ended.long()
    rows = zip(rollout.tokens.tolist(), stop.tolist(), strict=True)
    return [str(encoder.tokenizer.decode(row[:n])) for row, n in rows]


def answers(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: PolicyEncoder,
    prompts: Sequence[str],
    frames: Sequence[np.ndarray],
    size: int = 64,
) -> list[str]:
    """Return greedy answers to prompts with frames, uint8 [T, S, S, 3] RGB, of one media kind."""
    model.eval()
    out: list[str] = []
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        batch = encoder.batch(prompts[rows], None, np.stack(frames[rows]))
        out += texts(encoder, generate(model, encoder, batch))
    return out


_NUMBERS = re.compile(r"(\d{1,3}), (\d{1,3}), (\d{1,3}), (\d{1,3})\]")


def detection_iou(clip: PolicyClip, frame: int, answer: str) -> list[float]:
    """Return the IoU of each visible object's box in a `Scene: …` answer; 0 without a box."""
    out = []
    for index, item in clip.seen[frame].items():
        _, label, rest = answer.partition(f"{clip.names[index]} at [")
        box = _NUMBERS.match(rest) if label else None
        out.append(box_iou([int(v) for v in box.groups()], item.box) if box else 0.0)
    return out


def _named(clip: PolicyClip, index: int) -> ToyQuery:
    return ToyQuery(f"the {clip.names[index]}", (index,), "attribute")


def figures(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: PolicyEncoder,
    clips: Sequence[PolicyClip],
    prompts: Prompts,
) -> Mapping[str, float]:
    """Return the model card's figures on new clips; `kfg_visible_chance`: a random frame's."""
    videos = [c.frames for c in clips]
    replies = answers(model, encoder, [prompts.vdg(len(v)) for v in videos], videos)
    out = {"vdg_exact": _mean(a == c.description for a, c in zip(replies, clips, strict=True))}
    asked = [(c, _named(c, i % len(c.names))) for i, c in enumerate(clips)]
    questions = [prompts.kfg(q.text, len(c.frames)) for c, q in asked]
    chosen = [_frame(a) for a in answers(model, encoder, questions, videos)]
    seen = [[c.union(q, t) > 0 for t in range(len(c.frames))] for c, q in asked]
    best = [keyframe(c, q) for c, q in asked]
    replies = answers(model, encoder, ["When is each shape seen?"] * len(clips), videos)
    out["times_exact"] = _mean(a == times_text(c) for a, c in zip(replies, clips, strict=True))
    out["kfg_visible"] = _mean(t is not None and s[t] for t, s in zip(chosen, seen, strict=True))
    out["kfg_visible_chance"] = float(np.mean(seen))
    out["kfg_exact"] = _mean(t == b for t, b in zip(chosen, best, strict=True))
    frames = [i % len(c.frames) for i, c in enumerate(clips)]
    stills = [c.frames[t : t + 1] for c, t in zip(clips, frames, strict=True)]
    questions = [f"Video: {c.description}.\nList the shapes." for c in clips]
    replies = answers(model, encoder, questions, stills)
    rows = list(zip(clips, frames, replies, strict=True))
    out["detection_iou"] = float(np.mean([v for row in rows for v in detection_iou(*row)]))
    hidden = [
        (f"{name} hidden" in a) == (i not in c.seen[t])
        for c, t, a in rows
        for i, name in enumerate(c.names)
    ]
    out["presence"] = _mean(hidden)
    out["scene_exact"] = _mean(a == scene_text(c, t) for c, t, a in rows)
    return {k: round(v, 4) for k, v in out.items()}


def _mean(flags: Iterable[bool]) -> float:
    return float(np.mean([bool(f) for f in flags]))


def _frame(answer: str) -> int | None:
    match = re.fullmatch(r"<answer>([0-7])</answer>", answer)
    return int(match[1]) if match else None
