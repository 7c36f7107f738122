"""Generation for the tiny policy in plain PyTorch, and what the model card says of it.

`generate` reads a batch of prompts once and fans out n samples of each; it serves the figures of
the card and the laboratory, never the pipeline, whose engine is vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from rcot_rl.protocol.prompts import Prompts
from rcot_rl.tiny.policy_data import Clip, keyframe, scene_text
from rcot_rl.tiny.policy_model import Batch, Encoder, hidden_states


@dataclass(frozen=True)
class Rollout:
    """Sampled tokens [B * n, L]; lengths count up to and with the end of turn; `ended` bool."""

    tokens: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor


@torch.no_grad()
def generate(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: Encoder,
    batch: Batch,
    *,
    count: int = 1,
    temperature: float = 0.0,
    max_new: int = 128,
) -> Rollout:
    """`count` answers to each prompt of a left-padded batch; temperature 0 is greedy."""
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
        # A placeholder without its picture cannot be read again; engines ban them too.
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
    return Rollout(torch.stack(tokens, 1), lengths, ended)


def texts(encoder: Encoder, rollout: Rollout) -> list[str]:
    """Decoded responses, without the end of turn."""
    stop = rollout.lengths - rollout.ended.long()
    rows = zip(rollout.tokens.tolist(), stop.tolist(), strict=True)
    return [encoder.tokenizer.decode(row[:n]) for row, n in rows]


def answers(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: Encoder,
    prompts: Sequence[str],
    frames: Sequence[np.ndarray],
    size: int = 64,
) -> list[str]:
    """Greedy answers to (prompt, frames uint8 [T, S, S, 3]) pairs of one kind of media."""
    model.eval()
    out: list[str] = []
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        batch = encoder.batch(prompts[rows], None, np.stack(frames[rows]))
        out += texts(encoder, generate(model, encoder, batch))
    return out


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two half-open boxes; 0 when they do not meet."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (first, second)]
    return width * height / (sum(areas) - width * height)


_NUMBERS = re.compile(r"(\d{1,3}), (\d{1,3}), (\d{1,3}), (\d{1,3})\]")


def detection_iou(clip: Clip, frame: int, answer: str) -> list[float]:
    """IoU of each visible object's box as named in a `Scene: …` answer (0 where not found)."""
    out = []
    for index, item in clip.seen[frame].items():
        _, found, rest = answer.partition(f"{clip.names[index]} at [")
        box = _NUMBERS.match(rest) if found else None
        out.append(box_iou([int(v) for v in box.groups()], item.box) if box else 0.0)
    return out


def figures(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: Encoder,
    clips: Sequence[Clip],
    prompts: Prompts,
) -> Mapping[str, float]:
    """What the card reports, on clips the policy has not seen; see the keys' names.

    `kfg_*_chance` is what a frame drawn at random would get.
    """
    videos = [c.frames for c in clips]
    said = answers(model, encoder, [prompts.vdg(len(v)) for v in videos], videos)
    out = {"vdg_exact": _mean(a == c.description for a, c in zip(said, clips, strict=True))}
    asked = [prompts.kfg(c.queries[0].text, len(c.frames)) for c in clips]
    said = answers(model, encoder, asked, videos)
    chosen = [_frame(a) for a in said]
    seen = [[c.union(c.queries[0], t) > 0 for t in range(len(c.frames))] for c in clips]
    best = [keyframe(c, c.queries[0]) for c in clips]
    out["kfg_visible"] = _mean(t is not None and s[t] for t, s in zip(chosen, seen, strict=True))
    out["kfg_visible_chance"] = float(np.mean(seen))
    out["kfg_exact"] = _mean(t == b for t, b in zip(chosen, best, strict=True))
    frames = [i % len(c.frames) for i, c in enumerate(clips)]
    stills = [c.frames[t : t + 1] for c, t in zip(clips, frames, strict=True)]
    asked = [f"Video: {c.description}.\nList the shapes." for c in clips]
    said = answers(model, encoder, asked, stills)
    ious = [v for c, t, a in zip(clips, frames, said, strict=True) for v in detection_iou(c, t, a)]
    out["detection_iou"] = float(np.mean(ious))
    hidden = [
        (f"{name} hidden" in a) == (i not in c.seen[t])
        for c, t, a in zip(clips, frames, said, strict=True)
        for i, name in enumerate(c.names)
    ]
    out["presence"] = _mean(hidden)
    truth = [scene_text(c, t) for c, t in zip(clips, frames, strict=True)]
    out["scene_exact"] = _mean(a == b for a, b in zip(said, truth, strict=True))
    return {k: round(v, 4) for k, v in out.items()}


def _mean(flags: Sequence[bool] | object) -> float:
    return float(np.mean([bool(f) for f in flags]))


def _frame(answer: str) -> int | None:
    found = re.fullmatch(r"<answer>([0-7])</answer>", answer)
    return int(found.group(1)) if found else None


def as_json(values: Mapping[str, float]) -> str:
    """Figures as one line for the log."""
    return json.dumps(dict(values))
