"""Search settings for the tiny policy in plain torch: LoRA SFT, GRPO on AKS, then on KTG.

`python benchmarks/studies/plain_grpo.py --model DIR` takes minutes for one chain. It chose the
settings of `recipes/laptop.yaml`; its numbers are not results of the project, and no run uses it.
Rewards are the recipe's. After each stage the whole pipeline runs greedily on fresh clips, with the
true masks of the objects whose boxes were found in place of SAM2's: `J` is that of these masks.
Prints one JSON object per stage.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from data_pipelines.toy.queries import ToyQuery
from rcot_rl.protocol.prompts import Prompts, load_prompts
from rcot_rl.tiny.fast_forward import fast_forward
from rcot_rl.tiny.policy_data import (
    STREAM,
    PolicyClip,
    boxes_text,
    make_clip,
    scene_text,
)
from rcot_rl.tiny.policy_eval import answers, generate, texts
from rcot_rl.tiny.policy_model import IMAGE_CANVAS, PolicyBatch, PolicyEncoder
from rcot_rl.tiny.policy_train import loss_of
from reward_fns import Reward, load_reward
from reward_fns.components.hungarian_match import box_iou

PRESET = "fleeting"


@dataclass(frozen=True)
class Question:
    """One AKS or KTG question with its templated trace and ground truth."""

    task: str
    kind: str
    prompt: str
    response: str
    truth: object
    frames: np.ndarray


def make_rows(
    seed: Sequence[int], task: str, count: int, prompts: Prompts, multi: float = 0.25
) -> list[Question]:
    """Draw `count` questions: AKS A to B 1:1, a share `multi` of KTG with several targets."""
    rng = np.random.default_rng([STREAM, *seed, 9])
    rows: list[Question] = []
    several = round(multi * count)
    wanted = {True: several, False: count - several}
    options = {"A": count // 2, "B": count - count // 2}
    while len(rows) < count:
        clip = make_clip(rng, PRESET)
        query = clip.queries[rng.integers(len(clip.queries))]
        shown = [sum(i in seen for i in query.targets) for seen in clip.seen]
        full = [t for t, n in enumerate(shown) if n == len(query.targets)]
        if task == "ktg":
            many = len(query.targets) > 1
            if not full or not wanted[many]:
                continue
            wanted[many] -= 1
            rows.append(_row(clip, query, int(rng.choice(full)), "", prompts))
        else:
            option = "AB"[rng.integers(2)]
            frames = full if option == "A" else [t for t, n in enumerate(shown) if n == 0]
            if not frames or not options[option]:
                continue
            options[option] -= 1
            rows.append(_row(clip, query, int(rng.choice(frames)), option, prompts))
    return rows


def _row(clip: PolicyClip, query: ToyQuery, frame: int, option: str, prompts: Prompts) -> Question:
    names = [clip.names[i] for i in query.targets]
    if option:
        names.append("visible" if option == "A" else "hidden")
    think = f"{scene_text(clip, frame)} Target: {', '.join(names)}."
    boxes = boxes_text(clip, query.targets, frame)
    answer, truth = (option, option) if option else (boxes, json.loads(boxes))
    template = prompts.aks if option else prompts.ktg
    response = f"<think>{think}</think>\n<answer>{answer}</answer>"
    text = template(clip.description, query.text)
    return Question(
        "aks" if option else "ktg",
        query.kind,
        text,
        response,
        truth,
        clip.frames[frame : frame + 1],
    )


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
    seed: int,
    size: int = 32,
) -> Qwen2_5_VLForConditionalGeneration:
    """Train LoRA of rank 8 on every linear layer of the language model and merge it."""
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
    )
    tuned = get_peft_model(model, config)
    inner: Any = tuned.base_model.model
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    stream = draws(np.random.default_rng([STREAM, 5, seed]), rows, size)
    for step in range(steps):
        warm = min(1.0, (step + 1) / max(1, steps // 10))
        optimizer.param_groups[0]["lr"] = (
            rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        )
        part = next(stream)
        batch = encoder.batch([r.prompt for r in part], [r.response for r in part], stack(part))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(inner, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    merged: Any = tuned.merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged


def log_probs(
    model: Qwen2_5_VLForConditionalGeneration, batch: PolicyBatch, tokens: torch.Tensor, count: int
) -> torch.Tensor:
    """Return log-probabilities [B * count, L] of sampled tokens; each image is encoded once."""
    width = batch.ids.shape[1]
    ids = torch.cat([batch.ids.repeat_interleave(count, 0), tokens], 1)
    mask = torch.cat([batch.mask.repeat_interleave(count, 0), torch.ones_like(tokens)], 1)
    prompt = batch.positions.repeat_interleave(count, 1)
    rest = prompt[:, :, -1:] + 1 + torch.arange(tokens.shape[1])
    seen = model.model.visual(batch.pixels, grid_thw=batch.grid).pooler_output
    seen = seen.view(len(batch.ids), -1, seen.shape[-1]).repeat_interleave(count, 0).flatten(0, 1)
    embeds = model.get_input_embeddings()(ids)
    places = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(places, seen.to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=torch.cat([prompt, rest], 2),
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[:, width - 1 : -1]).float()
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@dataclass(frozen=True)
class GrpoPlan:
    """GRPO settings that the search varies."""

    steps: int = 60
    rate: float = 1e-4
    prompts: int = 16
    count: int = 8
    kl: float = 0.01
    max_new: int = 128
    temperature: float = 1.0
    scale: bool = True
    """Divide advantages by the group's standard deviation."""
    warm: int = 3
    final: float = 1.0
    """Share of the rate at the last step, reached linearly."""


def grpo(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: PolicyEncoder,
    rows: Sequence[Question],
    rewards: Mapping[str, Reward],
    plan: GrpoPlan,
    seed: int,
) -> list[list[float]]:
    """Train in place with GRPO: one update per rollout, low-variance KL, token mean.

    Returns, for every ten steps, mean reward, share of groups without spread, KL, and seconds.
    """
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.rate, betas=(0.9, 0.999), weight_decay=0.01
    )
    torch.manual_seed(seed)
    stream = draws(np.random.default_rng([STREAM, seed, 6]), rows, plan.prompts)
    started = time.monotonic()
    recent: list[tuple[float, float, float]] = []
    out: list[list[float]] = []
    for step in range(plan.steps):
        part = next(stream)
        batch = encoder.batch([r.prompt for r in part], None, stack(part))
        rollout = generate(
            model,
            encoder,
            batch,
            count=plan.count,
            temperature=plan.temperature,
            max_new=plan.max_new,
        )
        responses = texts(encoder, rollout)
        owners = [question for question in part for _ in range(plan.count)]
        score = torch.tensor(
            [
                rewards[question.task].score(r, question.truth).reward
                for r, question in zip(responses, owners, strict=True)
            ]
        ).view(-1, plan.count)
        spread = score.std(1, keepdim=True)
        advantage = score - score.mean(1, keepdim=True)
        if plan.scale:
            advantage = advantage / (spread + 1e-6)
        advantage = advantage.view(-1, 1)
        kept = torch.arange(rollout.tokens.shape[1])[None] < rollout.lengths[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                before = log_probs(reference, batch, rollout.tokens, plan.count)
            now = log_probs(model, batch, rollout.tokens, plan.count)
        ratio = (now - now.detach()).exp()
        gap = (before - now).clamp(-20, 20)
        penalty = (gap.exp() - gap - 1).clamp(-10, 10)
        loss = ((plan.kl * penalty - ratio * advantage) * kept).sum() / kept.sum()
        decayed = 1 - (1 - plan.final) * step / max(1, plan.steps - 1)
        optimizer.param_groups[0]["lr"] = plan.rate * min(1.0, (step + 1) / plan.warm) * decayed
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        dead = float((spread < 1e-6).float().mean())
        recent.append((float(score.mean()), dead, float((penalty * kept).sum() / kept.sum())))
        if (step + 1) % 10 == 0:
            means = [round(float(v), 3) for v in np.mean(recent[-10:], 0)]
            out.append([*means, round(time.monotonic() - started)])
            print(json.dumps({"step": step + 1, "reward dead kl s": out[-1]}), flush=True)
    return out


_FRAME = re.compile(r"<answer>(\d)</answer>")
_ANSWER = re.compile(r"<answer>(.{0,2000})</answer>\s*", re.DOTALL)


def _boxes(response: str) -> list[list[int]]:
    match = _ANSWER.search(response)
    try:
        rows = json.loads(match[1]) if match else []
        boxes = [[int(v) for v in row["bbox_2d"]] for row in rows]
        return [box for box in boxes if len(box) == 4]
    except (ValueError, TypeError, KeyError):
        return []


def pipeline(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: PolicyEncoder,
    clips: Sequence[PolicyClip],
    prompts: Prompts,
    rounds: int = 5,
) -> dict[str, float]:
    """Run VDG, KFG, AKS and KTG on one query of each clip; return J by kind and what went wrong."""
    queries = [clip.queries[i % len(clip.queries)] for i, clip in enumerate(clips)]
    videos = [clip.frames for clip in clips]
    told = answers(model, encoder, [prompts.vdg(8)] * len(clips), videos)
    asked = [prompts.kfg(q.text, 8) for q in queries]
    first = answers(model, encoder, asked, videos)
    frames = [int(m[1]) if (m := _FRAME.fullmatch(a)) else 0 for a in first]
    refused: list[list[int]] = [[] for _ in clips]
    open_ = list(range(len(clips)))
    for turn in range(rounds):
        questions = [prompts.aks(told[i], queries[i].text) for i in open_]
        stills = [videos[i][frames[i] : frames[i] + 1] for i in open_]
        replies = answers(model, encoder, questions, stills)
        open_ = [i for i, a in zip(open_, replies, strict=True) if a.endswith("<answer>B</answer>")]
        if not open_ or turn == rounds - 1:
            break
        for i in open_:
            refused[i].append(frames[i])
        again = [
            prompts.kfg_again(queries[i].text, 8, [(t, "") for t in refused[i]], told[i])
            for i in open_
        ]
        replies = answers(model, encoder, again, [videos[i] for i in open_])
        for i, a in zip(open_, replies, strict=True):
            match = _FRAME.fullmatch(a)
            frames[i] = int(match[1]) if match and int(match[1]) < 8 else frames[i]
    stills = [v[t : t + 1] for v, t in zip(videos, frames, strict=True)]
    questions = [prompts.ktg(d, q.text) for d, q in zip(told, queries, strict=True)]
    replies = answers(model, encoder, questions, stills)
    found: dict[str, list[float]] = defaultdict(list)
    for clip, query, frame, answer in zip(clips, queries, frames, replies, strict=True):
        chosen, false_area = set(), 0.0
        for box in _boxes(answer):
            overlaps = {i: box_iou(box, item.box) for i, item in clip.seen[frame].items()}
            best = max(overlaps, key=overlaps.__getitem__, default=None)
            if best is not None and overlaps[best] >= 0.5:
                chosen.add(best)
            else:
                false_area += max(0, (box[2] - box[0]) * (box[3] - box[1]))
        value = j_of(clip, set(query.targets), chosen, false_area)
        found["J"].append(value)
        found[f"J {query.kind}"].append(value)
        found["frame shows"].append(float(clip.union(query, frame) > 0))
        found["set right"].append(
            float(chosen == {i for i in query.targets if i in clip.seen[frame]} and not false_area)
        )
    found["vdg"] = [float(t == c.description) for t, c in zip(told, clips, strict=True)]
    return {k: round(float(np.mean(v)), 3) for k, v in sorted(found.items())}


def j_of(clip: PolicyClip, truth: set[int], chosen: set[int], false_area: float) -> float:
    """Return the mean IoU over frames of two unions of objects, which hardly overlap."""
    values = []
    for seen in clip.seen:
        both = sum(seen[i].area for i in truth & chosen if i in seen)
        either = sum(seen[i].area for i in truth | chosen if i in seen) + false_area
        values.append(both / either if either else 1.0)
    return float(np.mean(values))


def held_out(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: PolicyEncoder,
    rows: Sequence[Question],
    reward: Reward,
) -> dict[str, float]:
    """Return mean rewards and components: greedy, and of two samples per prompt."""
    model.eval()
    torch.manual_seed(0)
    out: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        batch = encoder.batch([r.prompt for r in part], None, stack(part))
        for mode, count, temperature in (("greedy", 1, 0.0), ("sampled", 2, 1.0)):
            rollout = generate(model, encoder, batch, count=count, temperature=temperature)
            responses = texts(encoder, rollout)
            for i, question in enumerate(part):
                group = responses[i * count : (i + 1) * count]
                scores = [reward.score(r, question.truth) for r in group]
                out[mode].append(float(np.mean([s.reward for s in scores])))
                if mode == "greedy":
                    out[f"greedy {question.kind}"].append(scores[0].reward)
                for name in scores[0].components:
                    value = float(np.mean([s.components[name] for s in scores]))
                    out[f"{mode} {name}"].append(value)
    return {k: round(float(np.mean(v)), 3) for k, v in sorted(out.items())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run SFT on both tasks, GRPO on AKS and then on KTG; measure after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sft", help="SFT checkpoint to start from, or to write")
    parser.add_argument("--sft-rows", default="256,512", help="AKS, KTG")
    parser.add_argument("--sft-epochs", type=int, default=6)
    parser.add_argument("--sft-rate", type=float, default=2e-3)
    parser.add_argument("--pool", default="640,1600", help="AKS, KTG")
    parser.add_argument(
        "--stages", default="aks:30,ktg:100", help="aks, ktg or joint : steps [: rate]"
    )
    parser.add_argument("--multi", type=float, default=0.25, help="share of KTG rows")
    parser.add_argument("--rewards", default="aks,ktg")
    parser.add_argument("--plan", default="{}", help="JSON of GrpoPlan")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    seed = options.seed
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    encoder, prompts = PolicyEncoder(tokenizer), load_prompts("compact")

    def load(folder: Path | str) -> Qwen2_5_VLForConditionalGeneration:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        fast_forward(model)
        return model

    names = dict(zip(("aks", "ktg"), options.rewards.split(","), strict=True))
    rewards = {t: load_reward(n, canvas=IMAGE_CANVAS) for t, n in names.items()}
    fresh = {t: make_rows([7, ord(t[0])], t, options.held_out, prompts) for t in names}
    rng = np.random.default_rng([STREAM, 10])
    clips = [make_clip(rng, PRESET) for _ in range(options.clips)]

    def measure(stage: str, model: Qwen2_5_VLForConditionalGeneration, extra: dict) -> None:
        model.eval()
        line = {"stage": stage, **extra}
        for rounds in (5, 0):
            line[f"pipeline {rounds}"] = pipeline(model, encoder, clips, prompts, rounds)
        for task, rows in fresh.items():
            line[task] = held_out(model, encoder, rows, load_reward(task, canvas=IMAGE_CANVAS))
        print(json.dumps(line), flush=True)

    if options.sft and Path(options.sft).is_dir():
        model = load(options.sft)
    else:
        model = load(options.model)
        counts = [int(n) for n in options.sft_rows.split(",")]
        rows = [
            row
            for task, count in zip(names, counts, strict=True)
            for row in make_rows([8, ord(task[0]), seed], task, count, prompts, options.multi)
        ]
        steps = options.sft_epochs * len(rows) // 32
        model = lora_sft(model, encoder, rows, steps, options.sft_rate, seed)
        if options.sft:
            model.save_pretrained(options.sft)
            tokenizer.save_pretrained(options.sft)
        model = load(options.sft) if options.sft else model
        measure("sft", model, {"rows": counts, "steps": steps})
    pools = [int(n) for n in options.pool.split(",")]
    rows_of = {
        task: make_rows([9, ord(task[0]), seed], task, size, prompts, options.multi)
        for task, size in zip(names, pools, strict=True)
    }
    rows_of["joint"] = [*rows_of["aks"], *rows_of["ktg"]]
    settings = json.loads(options.plan)
    for stage in filter(None, options.stages.split(",")):
        name, count, *rate = stage.split(":")
        plan = GrpoPlan(**{**settings, "steps": int(count)})
        plan = replace(plan, rate=float(rate[0])) if rate else plan
        curve = grpo(model, encoder, rows_of[name], rewards, plan, seed)
        measure(name, model, {"plan": asdict(plan), "curve": curve})
    if options.save:
        model.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)


if __name__ == "__main__":
    main()
