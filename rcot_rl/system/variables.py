"""Environment variables that containers and clusters do not set, or set for other processes.

`settle` gives this process and its children a user name and a home folder, which torch, vLLM,
Triton, Hugging Face, W&B and Ray need: a container may run under a uid without an entry in the
password database, and without a writable HOME. `for_children` removes the variables of another
launcher's process, such as a rank of an interactive allocation or a worker of another Ray.
"""

from __future__ import annotations

import os
import pwd
import socket
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_RANK = """
RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE
NODE_RANK MASTER_ADDR MASTER_PORT DIST_INIT_METHOD SLURM_PROCID SLURM_LOCALID SLURM_NTASKS
SLURM_NPROCS MPI_LOCALRANKID MPI_LOCALNRANKS
"""
_NOT_CUDA = "ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES"
"""verl refuses these beside CUDA_VISIBLE_DEVICES, which Ray sets; NVIDIA ignores them."""
_FOREIGN = frozenset((_RANK + _NOT_CUDA).split())
_FOREIGN_PREFIXES = ("PMI_", "PMIX_", "OMPI_", "MV2_COMM_WORLD_", "TORCHELASTIC_", "PET_")
"""Variables of a rank of another launcher."""
_RAY = """
RAY_ADDRESS RAY_REDIS_ADDRESS RAY_JOB_ID RAY_RAYLET_PID RAY_NODE_ID RAY_WORKER_ID RAY_CLUSTER_ID
RAY_SESSION_NAME RAY_NAMESPACE RAY_CLIENT_MODE RAY_JOB_CONFIG_JSON_ENV_VAR RAY_RUNTIME_ENV_HOOK
RAY_OVERRIDE_RESOURCES RAY_ENABLE_AUTO_CONNECT
"""
_OTHER_RAY = frozenset(_RAY.split())
"""Variables of a process of another Ray, such as the job or notebook that ran the command."""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
_CACHES = {
    "XDG_CACHE_HOME": ".cache",
    "XDG_CONFIG_HOME": ".config",
    "XDG_DATA_HOME": ".local/share",
    "TRITON_HOME": ".",
    "FLASHINFER_WORKSPACE_BASE": ".",
    "WANDB_CONFIG_DIR": ".config/wandb",
    "HF_DATASETS_CACHE": ".cache/huggingface/datasets",
}
"""Variable -> folder below HOME that a library writes to by default."""
_HUB = ".cache/huggingface"
_notes: list[str] = []


def settle(environment: MutableMapping[str, str] = os.environ) -> None:
    """Complete `environment` in place.

    Adds a user name and a home folder if they are missing (see `notes`), adds this host to
    `no_proxy`, and removes the variables that make this process a rank of another launcher.
    """
    for name in [n for n in environment if _is_foreign(n)]:
        del environment[name]
    added, notes = missing(environment)
    environment.update(added | _past_proxies(environment))
    _notes.extend(notes)


def notes() -> list[str]:
    """Return one sentence for each replacement that `settle` made or would make."""
    return [*_notes, *missing(os.environ)[1]]


def missing(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the variables that `environment` lacks, and one sentence for each replacement."""
    added: dict[str, str] = {}
    try:
        account = pwd.getpwuid(os.getuid())
    except KeyError:
        account = None
    if account is None and not any(environment.get(n) for n in ("LOGNAME", "USER")):
        added |= dict.fromkeys(("USER", "LOGNAME"), f"uid{os.getuid()}")  # read by getpass
    home = environment.get("HOME") or (account.pw_dir if account else "")
    if os.path.isdir(home) and environment.get("HOME") != home:
        added["HOME"] = home
    if not os.path.isdir(home):
        place = private_folder()
        added["HOME"] = str(place)
        reason = f"HOME={home} is not a folder" if home else "HOME is not set"
        return added, [f"{reason}: caches and settings go to {place}"]
    if os.access(home, os.W_OK | os.X_OK):
        return added, []
    unset = {name: below for name, below in _CACHES.items() if not environment.get(name)}
    if not unset:
        return added, []
    place = private_folder()
    hub = Path(home) / _HUB  # models in it can still be read
    if os.path.isdir(hub) and not environment.get("HF_HOME") and "XDG_CACHE_HOME" in unset:
        added["HF_HOME"] = str(hub)
    added |= {name: os.path.normpath(place / below) for name, below in unset.items()}
    return added, [f"HOME={home} is not writable: caches and settings go to {place}"]


def private_folder() -> Path:
    """Return a folder below TMPDIR that only this user can open, the same for all commands."""
    path = Path(tempfile.gettempdir()) / f"rcot-uid{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        facts = path.lstat()
        owned = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
        if owned and not facts.st_mode & 0o077:
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="rcot-uid"))  # another user has that name


def for_children(environment: Mapping[str, str], own_ray: bool = True) -> dict[str, str]:
    """Return the settled `environment` for the processes of a run.

    Args:
        own_ray: True if the children start their own Ray and must not connect to another one.
    """
    clean = {
        name: value
        for name, value in environment.items()
        if not _is_foreign(name) and not (own_ray and name in _OTHER_RAY)
    }
    clean |= missing(clean)[0]
    return clean | _past_proxies(clean)


def _is_foreign(name: str) -> bool:
    return name in _FOREIGN or name.startswith(_FOREIGN_PREFIXES)


def _past_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `no_proxy` with this host's addresses added, since a proxy cannot reach them."""
    if not any(environment.get(n) or environment.get(n.upper()) for n in _PROXIES):
        return {}
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    here = {
        a.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for a in addresses
        if a.family in families
    }
    words = [
        word.strip()
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy")
        for word in environment.get(name, "").split(",")
    ]
    words += ["localhost", "127.0.0.1", "::1", socket.gethostname(), *sorted(here)]
    text = ",".join(dict.fromkeys(word for word in words if word))
    given = ["no_grpc_proxy"] if environment.get("no_grpc_proxy") else []
    return dict.fromkeys(["no_proxy", "NO_PROXY", *given], text)
