"""Step 0 of a stage: the weights of the one before, and nothing of how it was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training import jobs
from rcot_rl.training.checkpoint_store import inspect
from rcot_rl.training.handoff import start_from


@pytest.fixture
def previous(tmp_path) -> Path:
    """A checkpoint of one rank after three steps of AdamW."""
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


def test_weights_stay_and_the_optimizer_is_the_new_stages(previous, tmp_path):
    made = start_from(previous, tmp_path / "ktg", 1e-3, 0.01, (0.9, 0.95))
    assert inspect(made, deep=True).whole and made.name == "global_step_0"
    of = {
        kind: torch.load(made / "actor" / f"{kind}_world_size_1_rank_0.pt", weights_only=False)
        for kind in ("model", "optim", "extra_state")
    }
    before = torch.load(previous / "actor" / "model_world_size_1_rank_0.pt")
    assert torch.equal(of["model"]["weight"], before["weight"])
    assert of["optim"]["state"] == {}
    (group,) = of["optim"]["param_groups"]
    found = (group["lr"], group["weight_decay"], group["betas"])
    assert found == (1e-3, 0.01, (0.9, 0.95))
    scheduler = of["extra_state"]["lr_scheduler"]
    assert (scheduler["base_lrs"], scheduler["last_epoch"]) == ([1e-3], 0)
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(4))])
    fresh.load_state_dict(of["optim"])
    assert fresh.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ([], ["8e-05", "0.01", "[0.9, 0.999]"]),
        (["grpo_ktg.learning_rate=0.5"], ["0.5", "0.01", "[0.9, 0.999]"]),
        (
            [
                "grpo_ktg.verl={actor_rollout_ref.actor: {optim: {lr: 0.25, betas: [0.9, 0.95]}}}",
                "grpo_aks.verl={actor_rollout_ref.actor.optim.betas: [0.1, 0.2]}",
            ],
            ["0.25", "0.01", "[0.9, 0.95]"],
        ),
    ],
)  # fmt: skip
def test_what_verl_is_told_is_what_step_0_has(settings, numbers):
    recipe = load_recipe("laptop", settings)
    arguments = jobs.start_job(recipe, "grpo-ktg", Path("/aks"), Path("/ktg"))
    assert arguments[4:6] == numbers[:2] and json.loads(arguments[6]) == json.loads(numbers[2])


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="no model shards"):
        start_from(tmp_path, tmp_path / "out", 1e-3, 0.01, (0.9, 0.999))
