"""Each patched name of verl still exists, and each patch does what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training import verl_patches
from rcot_rl.training.verl_config import training_environment
from rcot_rl.training.verl_patches import run_socket

ROOT = Path(__file__).resolve().parents[2]
VERL_SOCKET = "ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock"


def rebound_names(file: Path) -> Iterator[str]:
    """Return the attributes of verl's modules that a file assigns, by `=` or setattr."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] == "verl"
    }
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            targets = node.args[:1]
        for target in targets:
            owner = target.value if isinstance(target, ast.Attribute) else target
            if isinstance(owner, ast.Name) and owner.id in imported:
                yield f"{file.name}:{node.lineno}"


def test_only_one_module_rebinds_names_of_verl():
    files = [file for room in ("rcot_rl", "cluster") for file in (ROOT / room).rglob("*.py")]
    assert [
        name for file in files if file.name != "verl_patches.py" for name in rebound_names(file)
    ] == []


def test_a_name_that_verl_no_longer_has_is_refused():
    owner = SimpleNamespace(here=1)
    for patch in (verl_patches.require, verl_patches.replace, verl_patches.replaced):
        value = () if patch is verl_patches.require else (2,)
        with pytest.raises(verl_patches.VerlVersionError, match="has no missing"):
            outcome = patch(owner, "missing", *value)
            outcome.__enter__()
    assert vars(owner) == {"here": 1}


def test_a_temporary_patch_ends_with_its_block_also_on_an_error():
    owner = SimpleNamespace(name=1)
    with pytest.raises(ZeroDivisionError), verl_patches.replaced(owner, "name", 2):
        assert owner.name == 2
        owner.name / 0
    assert owner.name == 1


def test_both_ends_of_the_weight_sync_agree_and_runs_differ(monkeypatch):
    recipe = load_recipe("laptop")
    names = set()
    for attempt in ("runs/a/grpo-aks/attempt-1", "runs/b/grpo-aks/attempt-1"):
        run = training_environment(recipe, Path(attempt))["RCOT_RUN"]
        monkeypatch.setenv("RCOT_RUN", run)
        ends = {run_socket(VERL_SOCKET), run_socket(run_socket(VERL_SOCKET))}
        assert len(ends) == 1
        names |= ends
    assert len(names) == 2
    # the path of a Unix socket has at most 107 characters
    assert all(n.startswith("ipc:///tmp/") and len(n) < 107 for n in names)


def test_without_a_run_verls_socket_name_stays(monkeypatch):
    monkeypatch.delenv("RCOT_RUN", raising=False)
    assert run_socket(VERL_SOCKET) == VERL_SOCKET


@pytest.mark.slow
def test_samples_of_equal_length_keep_their_positions(run_verl_python):
    out = run_verl_python(
        """
import torch, verl
from tensordict import TensorDict
import verl.utils.tensordict_utils as tu
samples = [torch.arange(12).view(4, 3) + 100 * k for k in range(5)]
ragged = torch.nested.as_nested_tensor(samples, layout=torch.jagged)
data = {"position_ids": ragged}
tu.maybe_fix_3d_position_ids(data)
parts = data["position_ids"].unbind()
print(all(torch.equal(a, b) for a, b in zip(parts, samples)))
""",
        VERL_PLATFORM=None,
    )
    assert out.strip().endswith("True")


@pytest.mark.slow
def test_verl_finds_the_cpu_platform_and_engine_and_vllm(run_verl_python):
    out = run_verl_python(
        """
import verl
from verl.plugin.platform import get_platform
from verl.third_party.vllm import vllm_version
import rcot_rl.training.cpu.engine_cpu
from verl.workers.engine import EngineRegistry
print(get_platform().device_name, get_platform().communication_backend_name(), vllm_version)
"""
    )
    assert out.split()[-3:-1] == ["cpu", "gloo"]
    assert out.split()[-1].startswith("0.24.0")


@pytest.mark.slow
def test_every_temporary_patch_still_fits_verl(run_verl_python):
    out = run_verl_python(
        """
import verl
from verl.trainer import sft_trainer
from verl.workers.engine.fsdp import transformer_impl
from rcot_rl.training import verl_patches
from rcot_rl.training.sft_trainer import SealingCheckpointHandler
function = lambda: None
with (verl_patches.log_probs_by(function), verl_patches.unpinned_offload(),
      verl_patches.checkpoint_handler(SealingCheckpointHandler)):
    print(transformer_impl.logprobs_from_logits is function,
          transformer_impl.CPUOffloadPolicy(pin_memory=True).pin_memory,
          sft_trainer.CheckpointHandler is SealingCheckpointHandler)
print(transformer_impl.logprobs_from_logits is function,
      transformer_impl.CPUOffloadPolicy(pin_memory=True).pin_memory,
      sft_trainer.CheckpointHandler is SealingCheckpointHandler)
"""
    )
    assert out.split()[-6:] == ["True", "False", "True", "False", "True", "False"]


@pytest.mark.slow
def test_without_the_variable_a_users_own_verl_is_left_alone(run_verl_python):
    code = "import verl, sys; print('rcot_rl.training.verl_patches' in sys.modules)"
    assert run_verl_python(code, RCOT_RL_PLUGIN=None).strip().endswith("False")


@pytest.mark.slow
def test_another_version_of_verl_is_refused(monkeypatch):
    code = """
import importlib.metadata as metadata
lookup = metadata.version
metadata.version = lambda name: "0.10.0" if name == "verl" else lookup(name)
import verl
"""
    monkeypatch.setenv("RCOT_RL_PLUGIN", "required")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "rcot_rl patches verl 0.9.1, found 0.10.0" in done.stderr
