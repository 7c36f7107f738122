"""A run under a uid without an account, inside an allocation, behind a proxy (real stack)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STRANGER = ["unshare", "--user", "--map-user=1000910000"]
DEAD = "http://127.0.0.1:9"  # nothing listens there
GPUS = {"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "2"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
MPI = {"PMI_RANK": "1", "PMI_SIZE": "4"}
TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "3",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "10.1.2.3",
    "MASTER_PORT": "29500",
}
RAY = {
    "RAY_JOB_ID": "02000000",
    "RAY_RAYLET_PID": "1",
    "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {"working_dir": "/no/such"}}',
    "RAY_grpc_enable_http_proxy": "1",
}
PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), DEAD)
HOSTILE = GPUS | SLURM | MPI | TORCHRUN | RAY | PROXIES | {"grpc_proxy": DEAD}


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*STRANGER, "true"], stderr=-3).returncode != 0,
    reason="user namespaces are not permitted here",
)
def test_a_run_without_an_account_in_an_allocation_behind_a_proxy_completes(small, tmp_path):
    run, temporary = tmp_path / "run", Path("/tmp") / f"rcot-test-{os.getpid()}"
    temporary.mkdir()
    environment = HOSTILE | {"PATH": os.environ["PATH"], "TMPDIR": str(temporary)}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    words = ["run", "laptop", *small, "train.sft.epochs=1", "train.grpo-aks.steps=1"]
    words += ["eval.checkpoints=[grpo-aks]", "stages=[data, sft, grpo-aks, predict, eval]"]
    rcot = Path(sys.executable).parent / "rcot"
    try:
        done = subprocess.run(
            [*STRANGER, str(rcot), *words, "--out", str(run)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert (run / "grpo-aks/model/config.json").is_file() and (
            run / "eval/mevis-valid_u.json"
        ).is_file()
        assert (temporary / "rcot-uid1000910000").is_dir()
        assert not (tmp_path / "~").exists(), "a home that nobody expanded"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
