"""`rcot preflight`: each planted mistake has its code; a clean recipe has none; nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.plan import examine
from rcot_rl.cli import app
from rcot_rl.recipe.loader import load_recipe


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "WANDB_API_KEY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def errors(tmp_path: Path, *overrides: str, recipe: str = "laptop") -> dict[str, str]:
    report = examine(load_recipe(recipe, list(overrides)), tmp_path / "run")
    return {f.code: f.message for f in report.findings if f.severity == "error"}


def test_the_laptop_recipe_has_no_error_and_makes_no_folder(tmp_path: Path) -> None:
    assert errors(tmp_path) == {}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["wandb.mode=online"], "wandb", "wandb login"),
        (["cluster.ray_address=127.0.0.1:1"], "ray", "no Ray answers"),
        (["models.policy=/nowhere"], "inputs", "/nowhere"),
        (["models.segmenter=/nowhere"], "inputs", "/nowhere"),
        (["toy=null"], "inputs", "has no root"),
        (["prompts=shakespeare"], "inputs", "shakespeare"),
        (["grpo_aks.reward=akss"], "inputs", "did you mean 'aks'"),
        (["grpo_ktg.reward=mine.py:f"], "inputs", "mine.py"),
        (["grpo.max_prompt_length=20"], "grpo-aks.tokens", "16 tokens"),
        (["canvas.image=840"], "grpo-ktg.tokens", "900 tokens"),
        (["grpo_ktg.verl={actor_rollout_ref.actor.optim.lrr: 1}"], "grpo-ktg.verl", "optim.lr"),
        (["sft.verl={optim.lrs: 1}"], "sft.verl", "optim.lr"),
        (["cluster.nodes=2", "grpo.micro_batch_size=32", "sft.micro_batch_size=16"],
         "nodes", "starts one host"),
        (["stages=[grpo-aks]"], "grpo-aks.shards", "no manifest.json"),
    ],
)  # fmt: skip
def test_planted_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], code: str, says: str
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    found = errors(tmp_path, *overrides)
    assert says in found[code], found


def test_the_environment_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "unset RAY_ADDRESS" in errors(tmp_path)["ray"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "devices" in errors(tmp_path, recipe="rcot_seg_3b")


def test_several_faults_are_told_at_once_and_placement_says_what_verl_asks(tmp_path: Path) -> None:
    found = errors(tmp_path, "cluster.agent_workers=5000", recipe="rcot_seg_3b")
    assert "3 x 4 GPUs, 5000 agent" in found["placement"]
    assert {"inputs", "placement"} <= found.keys()


def test_json_is_one_document_and_the_status_says_whether_it_can_start(tmp_path: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["preflight", "laptop", "--json", "--out", str(tmp_path / "r")])
    assert good.exit_code == 0 and json.loads(good.stdout)["ok"] is True
    bad = runner.invoke(app, ["preflight", "laptop", "toy=null", "--json"])
    assert bad.exit_code == 2 and json.loads(bad.stdout)["findings"][0]["code"] == "inputs"


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from pathlib import Path; from cluster.plan import examine; "
        "from rcot_rl.recipe.loader import load_recipe; "
        "examine(load_recipe('laptop'), Path('runs/x')); "
        "print([m for m in ('torch', 'ray', 'vllm', 'verl', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
