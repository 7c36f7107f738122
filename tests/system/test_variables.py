"""Commands and their processes work without a user name or home, and inside other launchers."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.supervise.processes import Host
from rcot_rl.system import variables

ASKS = """
import getpass, os, pathlib
from rcot_rl.system import variables
variables.settle()
print(getpass.getuser(), pathlib.Path.home(), os.path.expanduser("~"), sep="\\n")
(pathlib.Path.home() / "probe").write_text("")
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Return a uid that has no entry in the password database."""

    def getpwuid(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)


def unshared() -> bool:
    words = ["unshare", "--user", "--map-user=1000910000", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(words, stderr=-3).returncode == 0


@pytest.mark.skipif(not unshared(), reason="user namespaces are not permitted here")
def test_uid_without_an_account_gets_a_name_and_a_home(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    words = ["unshare", "--user", "--map-user=1000910000", sys.executable, "-c", ASKS]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    home = str(tmp_path / "rcot-uid1000910000")
    assert done.stdout.split() == ["uid1000910000", home, home], done.stderr


def test_complete_environment_is_kept(temporary: Path) -> None:
    whole = {"HOME": str(temporary), "USER": "me"}
    assert variables.missing(whole) == ({}, [])
    environment = dict(whole)
    variables.settle(environment)
    assert environment == whole
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("home", [None, "", "/no/such/folder", __file__])
def test_missing_home_is_replaced_and_reported(
    temporary: Path, stranger: None, home: str | None
) -> None:
    given = {} if home is None else {"HOME": home}
    added, notes = variables.missing(given)
    place = temporary / f"rcot-uid{os.getuid()}"
    assert added["HOME"] == str(place) and place.stat().st_mode & 0o777 == 0o700
    assert added["USER"] == added["LOGNAME"] == f"uid{os.getuid()}"
    assert len(notes) == 1 and str(place) in notes[0] and (home or "not set") in notes[0]
    assert variables.missing(given) == (added, notes), "the same folder each time"


def test_home_comes_from_the_account(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = pwd.struct_passwd(("me", "x", 7, 7, "", str(temporary), "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: entry)
    assert variables.missing({}) == ({"HOME": str(temporary)}, [])


def test_home_that_is_not_writable_keeps_its_models(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = temporary / "home"
    (home / ".cache/huggingface").mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != home and access(p, mode))
    given = {"HOME": str(home), "USER": "me", "TRITON_HOME": "/mine"}
    added, notes = variables.missing(given)
    place = str(temporary / f"rcot-uid{os.getuid()}")
    assert added["HF_HOME"] == str(home / ".cache/huggingface")
    assert added["HF_DATASETS_CACHE"].startswith(place), "building a dataset writes there"
    assert added["XDG_CACHE_HOME"] == f"{place}/.cache"
    assert not {"HOME", "TRITON_HOME"} & added.keys()
    assert f"HOME={home} is not writable" in notes[0]
    assert variables.missing(given | added) == ({}, [])


def test_folder_that_others_can_open_is_not_used(temporary: Path) -> None:
    place = temporary / f"rcot-uid{os.getuid()}"
    for make in (lambda: place.mkdir(mode=0o777), lambda: place.symlink_to(temporary)):
        make()
        if not place.is_symlink():
            place.chmod(0o777)
        assert variables.private_folder() != place
        place.unlink() if place.is_symlink() else place.rmdir()


RANK_NAMES = """
RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT PMI_RANK PMI_SIZE PMIX_RANK OMPI_COMM_WORLD_SIZE
SLURM_PROCID SLURM_NTASKS PET_NNODES TORCHELASTIC_RUN_ID ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES
"""
RAY_NAMES = """
RAY_ADDRESS RAY_JOB_ID RAY_RAYLET_PID RAY_NODE_ID RAY_NAMESPACE RAY_JOB_CONFIG_JSON_ENV_VAR
"""
RANKS, RAYS = RANK_NAMES.split(), RAY_NAMES.split()
KEPT = ["CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_TMPDIR", "NCCL_DEBUG", "RAY_AUTH_TOKEN"]


@pytest.mark.parametrize("own_ray", [True, False])
def test_child_processes_are_not_ranks_or_workers_of_others(
    monkeypatch: pytest.MonkeyPatch, own_ray: bool
) -> None:
    for name in [*RANKS, *RAYS, *KEPT]:
        monkeypatch.setenv(name, "1")
    environment = Host({"MORE": "here"}, own_ray=own_ray).environment
    assert not set(RANKS) & environment.keys()
    assert (set(RAYS) & environment.keys()) == (set() if own_ray else set(RAYS))
    assert set(KEPT) | {"MORE"} <= environment.keys()


def test_settle_removes_rank_variables() -> None:
    environment = dict.fromkeys([*RANKS, *KEPT], "1") | {"HOME": "/", "USER": "me"}
    variables.settle(environment)
    assert not set(RANKS) & environment.keys() and set(KEPT) <= environment.keys()


@pytest.mark.parametrize("proxy", ["http_proxy", "HTTPS_PROXY", "all_proxy", "grpc_proxy"])
def test_this_host_bypasses_a_proxy(proxy: str) -> None:
    given = {
        "HOME": "/tmp",
        "USER": "me",
        proxy: "http://proxy:3128",
        "no_proxy": "intranet, 127.0.0.1",
    }
    environment = variables.for_children(given)
    words = environment["no_proxy"].split(",")
    assert words[:2] == ["intranet", "127.0.0.1"] and words.count("127.0.0.1") == 1
    assert {"localhost", "::1"} < set(words)
    assert environment["NO_PROXY"] == environment["no_proxy"]
    assert environment[proxy] == given[proxy], "hubs and W&B still go through it"
    settled = dict(given)
    variables.settle(settled)
    assert settled == environment, "the command itself also connects to a Ray dashboard here"
    assert variables.for_children(settled) == settled


def test_without_a_proxy_no_proxy_is_not_set() -> None:
    assert not {"no_proxy", "NO_PROXY"} & variables.for_children({"HOME": "/tmp"}).keys()
