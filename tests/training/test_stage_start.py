"""Step 0 of a stage has the previous stage's weights, and none of its optimizer state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training import jobs
from rcot_rl.training.checkpoint_store import inspect
from rcot_rl.training.stage_start import start_from


@pytest.fixture
def previous(tmp_path) -> Path:
    """Write a checkpoint of one rank after three steps of AdamW."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.5, betas=(0.5, 0.6), weight_decay=0.3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for _ in range(3):
        weight.grad = torch.ones(4)
        optimizer.step()
        scheduler.step()
    folder = tmp_path / "aks" / "global_step_3"
    (folder / "actor" / "huggingface").mkdir(parents=True)
    (folder / "actor" / "fsdp_config.json").write_text("{}")
    (folder / "actor" / "huggingface" / "config.json").write_text("{}")
    end = "world_size_1_rank_0.pt"
    torch.save({"weight": weight.data}, folder / "actor" / f"model_{end}")
    torch.save(optimizer.state_dict(), folder / "actor" / f"optim_{end}")
    extra = {"lr_scheduler": scheduler.state_dict(), "rng": {}}
    torch.save(extra, folder / "actor" / f"extra_state_{end}")
    return folder


def test_step_0_keeps_weights_and_resets_the_optimizer(previous, tmp_path):
    step0 = start_from(previous, tmp_path / "ktg", 1e-3, 0.01, (0.9, 0.95))
    assert inspect(step0, deep=True).whole and step0.name == "global_step_0"
    states = {
        kind: torch.load(step0 / "actor" / f"{kind}_world_size_1_rank_0.pt", weights_only=False)
        for kind in ("model", "optim", "extra_state")
    }
    before = torch.load(previous / "actor" / "model_world_size_1_rank_0.pt")
    assert torch.equal(states["model"]["weight"], before["weight"])
    assert states["optim"]["state"] == {}
    (group,) = states["optim"]["param_groups"]
    settings = (group["lr"], group["weight_decay"], group["betas"])
    assert settings == (1e-3, 0.01, (0.9, 0.95))
    scheduler = states["extra_state"]["lr_scheduler"]
    assert (scheduler["base_lrs"], scheduler["last_epoch"]) == ([1e-3], 0)
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(4))])
    fresh.load_state_dict(states["optim"])
    assert fresh.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ([], ["0.0003", "0.01", "[0.9, 0.999]"]),
        (["train.grpo-ktg.learning_rate=0.5"], ["0.5", "0.01", "[0.9, 0.999]"]),
        (
            [
                "train.grpo-ktg.verl="
                "{actor_rollout_ref.actor: {optim: {lr: 0.25, betas: [0.9, 0.95]}}}",
                "train.grpo-aks.verl={actor_rollout_ref.actor.optim.betas: [0.1, 0.2]}",
            ],
            ["0.25", "0.01", "[0.9, 0.95]"],
        ),
    ],
)
def test_step_0_has_the_settings_of_verls_configuration(settings, numbers):
    recipe = load_recipe("laptop", settings)
    arguments = jobs.start_job(recipe, "grpo-ktg", Path("/aks"), Path("/ktg"))
    assert arguments[4:6] == numbers[:2] and json.loads(arguments[6]) == json.loads(numbers[2])


def test_a_folder_without_model_shards_is_refused(tmp_path):
    with pytest.raises(InputError, match="no model shards"):
        start_from(tmp_path, tmp_path / "out", 1e-3, 0.01, (0.9, 0.999))
