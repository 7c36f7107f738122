"""The preflight's checks of canvases and token counts against limits.

Exact where the policy's own files are here: cells and limits of pixels from its processor, the text
of each prompt template through its tokenizer. A prompt's description and sentence differ from row
to row: what remains for them is told in the plan, and real rows are counted when shards are built
(their counts, once there are any, are checked by `checks_shards`).
"""

from __future__ import annotations

import json
from typing import Any

from cluster.preflight.checks.case import Case
from cluster.preflight.checks.findings import Notes
from data_pipelines.tokens import PixelLimits, TokenCounter, pixel_limits
from rcot_rl.errors import InputError
from rcot_rl.protocol.prompts import load_prompts, user_turn
from rcot_rl.recipe.schema import section_key

CELL = 28
"""Side of one vision token of Qwen2.5-VL, in pixels, where no processor says so."""


def canvas(case: Case, notes: Notes) -> None:
    """The pixel contract: the policy's processor takes both canvases as they are."""
    folder, recipe = case.policy.folder, case.recipe
    fix = "choose a canvas within the processor's limits, or raise them in its configuration"
    cost = "boxes learned on images of another size: days, and no error"
    own = recipe.data.canvas
    if own is not None and own != recipe.canvas.image:
        notes.error(
            "canvas.data", f"data.canvas={own}, but canvas.image={recipe.canvas.image}: rewards "
            "and inference take the latter", cost=cost, fix="leave data.canvas out",
        )  # fmt: skip
    if folder is None:
        notes.unknown(
            "canvas", "the policy's processor is not here: whether it would resize "
            f"canvas.image={recipe.canvas.image} or canvas.video={recipe.canvas.video} was not "
            "checked", cost=cost, fix="put the policy on this host",
        )  # fmt: skip
        return
    for name, limits in (("image", _image_limits(case)), ("video", _video_limits(case))):
        side = getattr(recipe.canvas, name)
        if limits is None:
            notes.unknown(
                "canvas", f"{folder}: no readable limits of {name} pixels", cost=cost,
                fix="complete the folder's processor_config.json",
            )  # fmt: skip
            continue
        try:
            limits.vision_tokens(side, side)
        except ValueError as error:
            notes.error(
                "canvas",
                f"canvas.{name}={side} does not suit {folder}: {error}",
                cost=cost,
                fix=fix,
            )


def prompts(case: Case, notes: Notes) -> None:
    """Each stage's shortest prompt fits, with room for description and sentence."""
    fixed, exact = _fixed_tokens(case)
    said = "exactly" if exact else "at least, without the template's text"
    for stage in case.grpo:
        task, g, key = stage.removeprefix("grpo-"), case.recipe.grpo(stage), section_key(stage)
        least = fixed[task]
        if least + 8 > g.max_prompt_length:
            notes.error(
                f"{stage}.tokens", f"{key}.max_prompt_length={g.max_prompt_length}: an image of "
                f"canvas.image={case.recipe.canvas.image} is {_vision(case)} tokens, and a prompt "
                f"without description and sentence {least} ({said})",
                cost="an error at the first prompt", fix=f"{key}.max_prompt_length={least + 600}",
            )  # fmt: skip
        positions = (case.policy.shape or {}).get("max_position_embeddings")
        longest = g.max_prompt_length + g.max_response_length
        if positions is not None and longest > positions:
            notes.error(
                f"{stage}.context", f"{key}: max_prompt_length + max_response_length = {longest} "
                f"is more than the policy's {positions} positions",
                cost="an error when the rollout engine starts", fix="lower one of the two",
            )  # fmt: skip
    s = case.recipe.sft
    if "sft" in case.todo and max(fixed.values()) + 16 > s.max_length:
        notes.error(
            "sft.tokens", f"sft.max_length={s.max_length}: a prompt without description and "
            f"sentence is {max(fixed.values())} tokens ({said}), and the response comes on top",
            cost="an error at the first batch", fix=f"sft.max_length={max(fixed.values()) + 1024}",
        )  # fmt: skip


def predict(case: Case, notes: Notes) -> None:
    """The engine's context holds the image, the longest answer, and a video of some frames."""
    if "predict" not in case.todo:
        return
    recipe, e = case.recipe, case.recipe.engine
    positions = (case.policy.shape or {}).get("max_position_embeddings", 32768)
    most = e.max_model_len or min(32768, positions)
    if e.max_model_len is not None and e.max_model_len > positions:
        notes.error(
            "predict.context", f"engine.max_model_len={e.max_model_len} is more than the policy's "
            f"{positions} positions", cost="an error when the engine starts",
            fix=f"engine.max_model_len={positions}",
        )  # fmt: skip
    p, vision = recipe.predict, _vision(case)
    for task, tokens in (("aks", p.aks_tokens), ("ktg", p.ktg_tokens)):
        if vision + tokens >= most:
            notes.error(
                "predict.tokens", f"engine.max_model_len={most}: canvas.image="
                f"{recipe.canvas.image} is {vision} tokens and predict.{task}_tokens={tokens}",
                cost="an error, or cut answers, after all of the training",
                fix=f"engine.max_model_len={vision + tokens + 600}",
            )  # fmt: skip
    a_pair = (recipe.canvas.video // CELL) ** 2
    frames = 2 * (max(0, most - max(p.vdg_tokens, p.kfg_tokens)) // a_pair)
    if frames < 8:
        notes.error(
            "predict.frames", f"engine.max_model_len={most} holds {frames} frames of canvas.video="
            f"{recipe.canvas.video} ({a_pair} tokens for two)",
            cost="an error at the first video, after all of the training",
            fix=f"engine.max_model_len={4 * a_pair + max(p.vdg_tokens, p.kfg_tokens)} holds 8, or "
            "lower canvas.video",
        )  # fmt: skip
    elif p.max_frames is not None and p.max_frames > frames:
        notes.error(
            "predict.frames", f"predict.max_frames={p.max_frames}: engine.max_model_len={most} "
            f"holds {frames} frames of canvas.video={recipe.canvas.video} ({a_pair} tokens for "
            "two)", cost="an error at the first long video", fix=f"predict.max_frames={frames}",
        )  # fmt: skip


def room(case: Case) -> dict[str, str]:
    """For the plan: what a prompt is made of, and what is left for description and sentence."""
    fixed, exact = _fixed_tokens(case)
    about = "" if exact else " at least (the policy's tokenizer is not here)"
    found = {}
    for stage in case.grpo:
        task, g = stage.removeprefix("grpo-"), case.recipe.grpo(stage)
        found[f"prompt of {task}"] = (
            f"{_vision(case)} vision + {fixed[task] - _vision(case)} template{about}; of "
            f"{g.max_prompt_length}, {g.max_prompt_length - fixed[task]} are left for description "
            "and sentence"
        )
    return found


def _fixed_tokens(case: Case) -> tuple[dict[str, int], bool]:
    """Task -> tokens of its prompt with an empty description and sentence; and whether exact."""
    vision, folder = _vision(case), case.policy.folder
    if folder is not None:
        try:
            counter, found = TokenCounter(folder), load_prompts(case.recipe.prompts)
            side = case.recipe.canvas.image
            zero = case.recipe.data.zero_target_share > 0
            said = {
                "aks": found.aks("", ""),
                "ktg": found.ktg("", "", zero_target=zero, canvas=side),
            }
            return {
                task: counter.lengths(
                    [{"role": "user", "content": user_turn(text, "image")}], None, side
                ).prompt
                for task, text in said.items()
            }, True
        except InputError:
            pass  # `checks_inputs.policy` and `canvas` say what is wrong with it
    return {"aks": vision, "ktg": vision}, False


def _vision(case: Case) -> int:
    limits = _image_limits(case)
    return (case.recipe.canvas.image // (limits.cell if limits else CELL)) ** 2


def _image_limits(case: Case) -> PixelLimits | None:
    if case.policy.folder is None:
        return None
    try:
        return pixel_limits(case.policy.folder)
    except InputError:
        return None


def _video_limits(case: Case) -> PixelLimits | None:
    """Of frames: those of the video processor, or the image processor's where it has none."""
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
