"""The preflight's checks of canvases and token counts against limits.

Exact if the policy's files are here: cell size and pixel limits from its processor, each prompt
template through its tokenizer. Description and sentence of a prompt differ from row to row: the
plan shows what remains for them, and the rows' tokens are counted when shards are built
(`built_shards` checks these counts).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.preflight.checks.case import RunCase
from cluster.preflight.checks.findings import Notes
from cluster.preflight.checks.rewards import rows_of
from data_pipelines.tokens import PixelLimits, TokenCounter, pixel_limits, read_tokenizer
from rcot_rl.errors import InputError
from rcot_rl.inference.frame_budget import (
    QUERY_TOKENS,
    TEMPLATE_TOKENS,
    text_tokens,
    video_tasks,
)
from rcot_rl.prediction_layout import benchmark_name
from rcot_rl.protocol.prompts import load_prompts, user_turn
from rcot_rl.recipe.schema import TASKS, RowTask

CELL = 28
"""Side of one vision token of Qwen2.5-VL in pixels, if no processor tells."""


def canvas(case: RunCase, notes: Notes) -> None:
    """Check the pixel contract: the policy's processor resizes neither canvas."""
    folder, recipe = case.policy.folder, case.recipe
    cost = "boxes learned on images of another size: days, and no error"
    if folder is None:
        notes.unknown(
            "canvas",
            "the policy's processor is not here: whether it would resize "
            f"canvas.image={recipe.canvas.image} or canvas.video={recipe.canvas.video} was not "
            "checked",
            cost=cost,
            fix="put the policy on this host",
        )
        return
    for name, limits in (("image", _image_limits(case)), ("video", _video_limits(case))):
        side = getattr(recipe.canvas, name)
        if limits is None:
            notes.unknown(
                "canvas",
                f"{folder}: no readable limits of {name} pixels",
                cost=cost,
                fix="complete the folder's processor_config.json",
            )
            continue
        try:
            limits.vision_tokens(side, side)
        except ValueError as error:
            notes.error(
                "canvas",
                f"canvas.{name}={side} does not suit {folder}: {error}",
                cost=cost,
                fix="choose a canvas within the processor's limits, or raise them in its "
                "configuration",
            )


def prompts(case: RunCase, notes: Notes) -> None:
    """Check that a prompt fits into each stage, with room for description and sentence."""
    fixed, exact = _fixed_tokens(case)
    bound = "exactly" if exact else "at least, without the template's text"
    for stage in case.grpo:
        g, key = case.recipe.grpo(stage), f"train.{stage}"
        least = max(fixed[task] for task in rows_of(case, stage) or TASKS)
        if least + 8 > g.max_prompt_length:
            notes.error(
                f"{stage}.tokens",
                f"{key}.max_prompt_length={g.max_prompt_length}: an image of "
                f"canvas.image={case.recipe.canvas.image} is {_vision(case)} tokens, and a prompt "
                f"without description and sentence {least} ({bound})",
                cost="an error at the first prompt",
                fix=f"{key}.max_prompt_length={least + 600}",
            )
        positions = (case.policy.shape or {}).get("max_position_embeddings")
        longest = g.max_prompt_length + g.max_response_length
        if positions is not None and longest > positions:
            notes.error(
                f"{stage}.context",
                f"{key}: max_prompt_length + max_response_length = {longest} "
                f"is more than the policy's {positions} positions",
                cost="an error when the rollout engine starts",
                fix="lower one of the two",
            )
    for stage in case.sft:
        limit, key = case.recipe.sft(stage).max_length, f"train.{stage}.max_length"
        least = max(fixed[task] for task in rows_of(case, stage) or TASKS)
        if least + 16 > limit:
            notes.error(
                f"{stage}.tokens",
                f"{key}={limit}: a prompt without description and sentence is {least} tokens "
                f"({bound}), and the response comes on top",
                cost="an error at the first batch",
                fix=f"{key}={least + 1024}",
            )


def predict(case: RunCase, notes: Notes) -> None:
    """Check that the engine's context holds an image, the longest answer, and enough frames."""
    if "predict" not in case.todo:
        return
    recipe, e = case.recipe, case.recipe.engine
    positions = (case.policy.shape or {}).get("max_position_embeddings", 32768)
    most = e.max_model_len or min(32768, positions)
    if e.max_model_len is not None and e.max_model_len > positions:
        notes.error(
            "predict.context",
            f"engine.max_model_len={e.max_model_len} is more than the policy's {positions} "
            "positions",
            cost="an error when the engine starts",
            fix=f"engine.max_model_len={positions}",
        )
    p, vision = recipe.predict, _vision(case)
    for task, tokens in (("aks", p.aks_tokens), ("ktg", p.ktg_tokens)):
        if vision + tokens >= most:
            notes.error(
                "predict.tokens",
                f"engine.max_model_len={most}: canvas.image={recipe.canvas.image} is {vision} "
                f"tokens and predict.{task}_tokens={tokens}",
                cost="an error, or truncated answers, after all of the training",
                fix=f"engine.max_model_len={vision + tokens + 600}",
            )
    pair, frames = _pair_tokens(case), frames_that_fit(case)
    least = _longest_text(case) + 4 * pair
    if frames < min(8, p.max_frames or 8):
        notes.error(
            "predict.frames",
            f"engine.max_model_len={most} holds {frames} frames of canvas.video="
            f"{recipe.canvas.video} ({pair} tokens for two) beside the longest prompt and response",
            cost="an error at the first video, after all of the training",
            fix=f"engine.max_model_len={least} holds 8, or lower canvas.video",
        )
    elif p.max_frames is not None and p.max_frames > frames:
        notes.warning(
            "predict.frames",
            f"predict.max_frames={p.max_frames}: engine.max_model_len={most} holds {frames} frames "
            f"of canvas.video={recipe.canvas.video} ({pair} tokens for two)",
            cost=f"longer videos are thinned to {frames} frames",
            fix=f"predict.max_frames={frames}",
        )


def frames_that_fit(case: RunCase) -> int:
    """Return the number of frames that VDG and KFG can show, by the rule of the pipeline."""
    positions = (case.policy.shape or {}).get("max_position_embeddings", 32768)
    most = case.recipe.engine.max_model_len or min(32768, positions)
    return max(0, 2 * ((most - _longest_text(case)) // _pair_tokens(case)))


def _longest_text(case: RunCase) -> int:
    """Return the tokens of the longest prompt about a video, and of its response.

    Without the policy's tokenizer, a text is counted as one token for two characters.
    """
    recipe = case.recipe

    def count(text: str) -> int:
        return (len(text) + 1) // 2

    folder = case.policy.folder
    try:
        prompts = load_prompts(recipe.prompts)
        if folder is not None:
            tokenizer, _ = read_tokenizer(folder)

            def count(text: str) -> int:
                return len(tokenizer.encode(text, add_special_tokens=False).ids)

        settings = recipe.predict.reasoning()
        texts = [
            text_tokens(task, prompts, settings, count, "x " * QUERY_TOKENS)
            for task in video_tasks(settings)
        ]
    except InputError:  # `inputs.prompts` and `inputs.policy` report it
        return 0
    return max(texts, default=0) + TEMPLATE_TOKENS


def clips(case: RunCase) -> dict[str, str]:
    """Return lines of the plan: clips of each benchmark that are too long to be shown whole.

    Toy corpora are written later; their clips are short.
    """
    from data_pipelines.corpora import open_corpus

    if "predict" not in case.todo:
        return {}
    fits = frames_that_fit(case)
    most = min(fits, case.recipe.predict.max_frames or fits)
    lines = {}
    for benchmark in case.recipe.eval.benchmarks:
        if benchmark.root is None:
            continue
        name = benchmark_name(benchmark.dataset, benchmark.split)
        try:
            corpus = open_corpus(benchmark.dataset, Path(benchmark.root), benchmark.split)
            lengths = [len(video.frames) for video in corpus.videos()]
        except InputError:  # `inputs.corpora` reports it
            continue
        longer = sum(length > most for length in lengths)
        shown = f"{longer} are thinned uniformly to {most}" if longer else f"all fit ({most})"
        lines[f"predict: {name}"] = (
            f"{len(lengths)} clips, the longest has {max(lengths, default=0)} frames; {shown}; "
            "masks are made for every frame"
        )
    return lines


def _pair_tokens(case: RunCase) -> int:
    """Return the tokens of two frames, which Qwen2.5-VL merges."""
    return (case.recipe.canvas.video // CELL) ** 2


def room(case: RunCase) -> dict[str, str]:
    """Return lines of the plan: tokens of a prompt, and what is left for its varying texts."""
    fixed, exact = _fixed_tokens(case)
    about = "" if exact else " at least (the policy's tokenizer is not here)"
    vision, lines = _vision(case), {}
    for stage in case.grpo:
        limit = case.recipe.grpo(stage).max_prompt_length
        for task in rows_of(case, stage):
            lines[f"{stage}: {task} prompt"] = (
                f"{vision} vision + {fixed[task] - vision} template{about}; of {limit}, "
                f"{limit - fixed[task]} are left for description and sentence"
            )
    return lines


def _fixed_tokens(case: RunCase) -> tuple[dict[RowTask, int], bool]:
    """Return task -> tokens of a prompt without description and sentence, and whether exact."""
    vision, folder = _vision(case), case.policy.folder
    if folder is not None:
        try:
            counter = TokenCounter(folder)
            prompts = load_prompts(case.recipe.prompts, response=case.recipe.data.response)
            side = case.recipe.canvas.image
            zero = case.recipe.data.zero_target_share > 0
            texts: dict[RowTask, str] = {
                "aks": prompts.aks("", ""),
                "ktg": prompts.ktg("", "", zero_target=zero, canvas=side),
            }
            return {
                task: counter.lengths(
                    [{"role": "user", "content": user_turn(text, "image")}], None, side
                ).prompt
                for task, text in texts.items()
            }, True
        except InputError:
            pass  # `inputs.policy` and `canvas` report it
    return {"aks": vision, "ktg": vision}, False


def _vision(case: RunCase) -> int:
    limits = _image_limits(case)
    return (case.recipe.canvas.image // (limits.cell if limits else CELL)) ** 2


def _image_limits(case: RunCase) -> PixelLimits | None:
    if case.policy.folder is None:
        return None
    try:
        return pixel_limits(case.policy.folder)
    except InputError:
        return None


def _video_limits(case: RunCase) -> PixelLimits | None:
    """Return the pixel limits of video frames, or the image processor's if there are none."""
    folder = case.policy.folder
    assert folder is not None
    for name in ("video_preprocessor_config.json", "processor_config.json"):
        try:
            config: Any = json.loads((folder / name).read_text(encoding="utf-8"))
            config = config.get("video_processor", config if name.startswith("video") else None)
            size = config["size"]
            cell = config["patch_size"] * config["merge_size"]
            return PixelLimits(cell, int(size["shortest_edge"]), int(size["longest_edge"]))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return _image_limits(case)
