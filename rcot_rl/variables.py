"""Environment variables: what containers and clusters leave out, and what they hand down too much.

`settle` gives this process and all that it starts a user's name and a home, which torch, vLLM,
Triton, Hugging Face, W&B and Ray ask for: a container may run under a uid that has no entry in the
password database, with no HOME or with one that cannot be written. `for_children` removes what
belongs to another launcher's processes: an interactive allocation's ranks, another Ray's worker.
"""

from __future__ import annotations

import os
import pwd
import socket
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_FOREIGN = frozenset(
    {
        # verl refuses these beside CUDA_VISIBLE_DEVICES, which Ray sets; NVIDIA ignores them
        "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES",
        # a rank of another launcher
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
        "ROLE_RANK", "ROLE_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
        "DIST_INIT_METHOD", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NPROCS",
        "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
    }
)  # fmt: skip
_FOREIGN_PREFIXES = ("PMI_", "PMIX_", "OMPI_", "MV2_COMM_WORLD_", "TORCHELASTIC_", "PET_")
_OTHER_RAY = frozenset(
    {
        "RAY_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_NODE_ID",
        "RAY_WORKER_ID", "RAY_CLUSTER_ID", "RAY_SESSION_NAME", "RAY_NAMESPACE", "RAY_CLIENT_MODE",
        "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_RUNTIME_ENV_HOOK", "RAY_OVERRIDE_RESOURCES",
        "RAY_ENABLE_AUTO_CONNECT",
    }
)  # fmt: skip
"""Of a process of another Ray, such as a job or a notebook in which the command was typed."""
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
"""Where libraries write below HOME."""
_HUB = ".cache/huggingface"
_notes: list[str] = []


def settle(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add a user's name and a home to `environment` where it has none (see `notes`), and this host
    to `no_proxy`; remove what makes this process a rank of another launcher."""
    for name in [n for n in environment if _is_foreign(n)]:
        del environment[name]
    added, notes = missing(environment)
    environment.update(added | _past_proxies(environment))
    _notes.extend(notes)


def notes() -> list[str]:
    """What `settle` had to decide, or would have to, a sentence each; for the preflight."""
    return [*_notes, *missing(os.environ)[1]]


def missing(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Variables that `environment` needs and lacks, and what is to be said of them."""
    added: dict[str, str] = {}
    try:
        account = pwd.getpwuid(os.getuid())
    except KeyError:
        account = None
    if account is None and not any(environment.get(n) for n in ("LOGNAME", "USER")):
        added |= dict.fromkeys(("USER", "LOGNAME"), f"uid{os.getuid()}")  # getpass looks here first
    home = environment.get("HOME") or (account.pw_dir if account else "")
    if os.path.isdir(home) and environment.get("HOME") != home:
        added["HOME"] = home
    if not os.path.isdir(home):
        place = private_folder()
        added["HOME"] = str(place)
        why = f"HOME={home} is no folder" if home else "HOME is not set"
        return added, [f"{why}: {place} takes its place, for caches and settings"]
    if os.access(home, os.W_OK | os.X_OK):
        return added, []
    absent = {name: below for name, below in _CACHES.items() if not environment.get(name)}
    if not absent:
        return added, []
    place = private_folder()
    hub = Path(home) / _HUB  # models that lie there can still be read
    if os.path.isdir(hub) and not environment.get("HF_HOME") and "XDG_CACHE_HOME" in absent:
        added["HF_HOME"] = str(hub)
    added |= {name: os.path.normpath(place / below) for name, below in absent.items()}
    return added, [f"HOME={home} cannot be written: caches and settings go to {place}"]


def private_folder() -> Path:
    """A folder for this user alone below TMPDIR, the same for all commands."""
    path = Path(tempfile.gettempdir()) / f"rcot-uid{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        facts = path.lstat()
        ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
        if ours and not facts.st_mode & 0o077:
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="rcot-uid"))  # another user was first


def for_children(environment: Mapping[str, str], own_ray: bool = True) -> dict[str, str]:
    """`environment` for the processes of a run, settled.

    own_ray: they start a Ray of their own, and must not find another's.
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
    """`no_proxy` with this host's addresses: a proxy cannot reach them."""
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
