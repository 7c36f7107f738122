"""`rcot preflight` checks this host and the run folder: variables, ports, earlier runs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cluster.preflight.checks import case
from cluster.preflight.checks import host as checks_host
from cluster.preflight.checks.findings import Report
from rcot_rl.inference.model_folder import TINY
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.runfolder import RunFolder


def message(report: Report, code: str, severity: str = "error") -> str:
    messages = [f.message for f in report.findings if (f.code, f.severity) == (code, severity)]
    assert messages, report.text()
    return messages[0]


@pytest.mark.parametrize(
    ("name", "value", "on", "override", "code", "says"),
    [
        ("RAY_ADDRESS", "10.0.0.1:6379", "laptop", "seed=1", "ray", "unset RAY_ADDRESS"),
        ("CUDA_VISIBLE_DEVICES", "", "3b", "seed=1", "devices", "no GPU is visible"),
        ("CUDA_VISIBLE_DEVICES", "0,1", "3b", "seed=1", "devices", "fewer than cluster.gpus"),
        ("WANDB_API_KEY", "secret", "laptop", "wandb.mode=online", "wandb.key", "6 characters"),
        ("WANDB_API_KEY", "k" * 40 + "\n", "laptop", "wandb.mode=online", "wandb.key", "blanks"),
        ("HF_HUB_OFFLINE", "1", "3b", "models.policy=a/b", "inputs.policy", "HF_HUB_OFFLINE"),
        ("HF_HUB_OFFLINE", "1", "3b", "models.segmenter=a/b", "inputs.segmenter", "a/b"),
    ],
)
def test_a_wrong_variable_is_named(
    look: Callable[..., Report],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    on: str,
    override: str,
    code: str,
    says: str,
) -> None:
    monkeypatch.setenv(name, value)
    assert says in message(look(on, override), code)


def test_no_secret_is_printed(look: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    report = look("laptop", "wandb.mode=online")
    assert "hunter2" not in report.text() + json.dumps(report.as_dict())


def test_a_long_tmpdir_breaks_rays_sockets(
    look: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/scratch/" + "deep/" * 12)
    assert "107 are possible" in message(look("laptop"), "ray.tmpdir")
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert not [f for f in look("laptop").findings if f.code == "ray.tmpdir"]


def test_the_limit_of_socket_paths_is_this_systems(tmp_path: Path) -> None:
    stem = "/" + "x" * (checks_host._SOCKET_MOST - 1)
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(FileNotFoundError):
        probe.connect(stem)
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(OSError, match="too long"):
        probe.connect(stem + "x")


def test_a_fixed_port_that_is_taken_is_an_error(look: Callable[..., Report]) -> None:
    key = "transfer_queue.metrics.port"
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        override = f"train.grpo-ktg.verl={{{key}: {port}}}"
        assert f"{key}={port} is taken" in message(look("laptop", override), "grpo-ktg.ports")
    assert not [f for f in look("laptop", override).findings if f.code.endswith("ports")]


def test_a_metrics_port_that_is_taken_is_an_error(look: Callable[..., Report]) -> None:
    with socket.create_server(("", 0)) as server:
        override = f"cluster.metrics_port={server.getsockname()[1]}"
        assert f"{override} is taken" in message(look("laptop", override), "ray.metrics_port")
    assert not [f for f in look("laptop", override).findings if f.code == "ray.metrics_port"]


@pytest.mark.parametrize("make", ["other_recipe", "not_a_run", "a_file", "broken_record"])
def test_a_folder_that_this_recipe_cannot_use_is_an_error(
    look: Callable[..., Report], tmp_path: Path, make: str
) -> None:
    root = tmp_path / "run"
    if make == "a_file":
        root.write_text("")
    else:
        root.mkdir()
        (root / "sft").mkdir()
    if make == "other_recipe":
        record = {"recipe": load_recipe("laptop", ["seed=7"]).model_dump(mode="json")}
        (root / "recipe.yaml").write_text(yaml.safe_dump(record))
    elif make == "broken_record":
        (root / "recipe.yaml").write_text("- no\n- mapping\n")
    report = look("laptop", root=root)
    code = "folder.writable" if make == "a_file" else "folder.recipe"
    assert str(root) in message(report, code)
    if make == "other_recipe":
        assert "differs in: seed" in message(report, code)


def test_a_folder_name_that_packages_interpret_is_an_error(
    look: Callable[..., Report], tmp_path: Path
) -> None:
    says = message(look("laptop", root=tmp_path / "ktg[lr=1e-6]"), "folder.name")
    assert "ktg[lr=1e-6]" in says and "'['" in says


def test_the_folder_of_this_recipes_run_has_no_finding_and_is_not_written(
    look: Callable[..., Report], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    RunFolder.claim(root, load_recipe("laptop"))
    (root / "sft").mkdir()
    before = {p: p.read_bytes() for p in root.iterdir() if p.is_file()}
    assert not [f for f in look("laptop", root=root).findings if f.code.startswith("folder")]
    moved = look("laptop", "cluster.stall_timeout_s=60", root=root)
    assert not [f for f in moved.findings if f.code.startswith("folder")]
    assert before == {p: p.read_bytes() for p in root.iterdir() if p.is_file()}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_an_error(
    look: Callable[..., Report], tmp_path: Path
) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    report = look("laptop", root=tmp_path / "closed" / "run")
    assert str(tmp_path / "closed") in message(report, "folder.writable")


def test_finished_stages_are_not_checked_again(look: Callable[..., Report], tmp_path: Path) -> None:
    root = tmp_path / "run"
    folder = RunFolder.claim(root, load_recipe("laptop", ["train.grpo-aks.top_k=0"]))
    assert "grpo-aks.top_k" in {f.code for f in look("laptop", "train.grpo-aks.top_k=0").findings}
    (root / "grpo-aks").mkdir()
    folder.mark_done("grpo-aks")
    report = look("laptop", "train.grpo-aks.top_k=0", root=root)
    assert "grpo-aks.top_k" not in {f.code for f in report.findings}
    assert report.plan["done before"] == "grpo-aks"


def test_a_version_other_than_the_locks_is_reported(
    look: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda n: "0.8.0" if n == "verl" else installed(n)
    )
    report = look("laptop")
    assert "verl 0.8.0 is installed" in message(report, "verl.version")
    assert message(report, "versions", "warning")


def test_missing_vllm_for_the_device_is_an_error(
    look: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    report = look("3b")
    assert "vllm is not installed" in message(report, "engine")
    (fix,) = [f.fix for f in report.findings if f.code == "engine"]
    makefile = (Path(checks_host.__file__).parents[3] / "Makefile").read_text()
    assert "make setup-gpu" in fix and "setup-gpu: LOCK := requirements/gpu.lock" in makefile
    assert (
        "\nvllm==" in (Path(checks_host.__file__).parents[3] / "requirements/gpu.lock").read_text()
    )


def test_the_facts_of_this_host_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 49140\necho 24576\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    facts = case.host_facts(tmp_path / "not" / "there", look_for_gpu=True)
    assert (facts.gpus, facts.gpu_gib) == (2, 24.0)
    assert facts.cpus >= 1 and facts.available_bytes > 0
    assert facts.disk_free_bytes > 0 and facts.ram_bytes > 2**28
    program.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    assert case.host_facts(tmp_path, look_for_gpu=True).gpus is None


def test_a_missing_home_is_a_warning(
    look: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert not [f for f in look("laptop").findings if f.code == "home"]
    monkeypatch.setenv("HOME", "/no/such/home")
    assert "HOME=/no/such/home is not a folder" in message(look("laptop"), "home", "warning")


def test_a_broken_model_of_a_finished_stage_is_an_error(
    look: Callable[..., Report], tmp_path: Path
) -> None:
    alone = "stages=[grpo-aks]"
    folder = RunFolder.claim(tmp_path / "run", load_recipe("laptop", [alone]))
    shutil.copytree(TINY, folder.root / "sft" / "model")
    folder.mark_done("sft")
    weights = folder.root / "sft" / "model" / "model.safetensors"
    assert "inputs.trained" not in {f.code for f in look("laptop", alone).findings}
    weights.write_bytes(weights.read_bytes()[:-10])
    assert message(look("laptop", alone), "inputs.trained").startswith(f"{weights}: unreadable")


def test_an_unknown_commit_is_a_warning(
    look: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks_host, "is_checkout", lambda: True)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "git is not on PATH" in message(look("laptop"), "git", "warning")
