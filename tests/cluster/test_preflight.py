"""Each fault that can be known beforehand is named before a stage starts."""

import socket
import threading

import pytest

from cluster import preflight
from rcot_rl.errors import InputError
from rcot_rl.recipe.loader import load_recipe

ALL = ["data", "sft", "grpo-aks", "grpo-ktg", "predict"]


def fault(tmp_path, *overrides: str, stages=ALL) -> str:
    with pytest.raises(InputError) as caught:
        preflight.check_host(load_recipe("laptop", list(overrides)), tmp_path, stages)
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_the_laptop_recipe_passes(tmp_path):
    preflight.check_host(load_recipe("laptop"), tmp_path, ALL)


def test_a_running_ray_that_would_be_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    message = fault(tmp_path)
    assert "RAY_ADDRESS=10.0.0.1:6379" in message and "cluster.ray_address" in message


def test_no_ray_answers_where_the_recipe_says(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "no Ray answers" in fault(tmp_path, f"cluster.ray_address=127.0.0.1:{port}")


def test_a_ray_that_answers_is_accepted(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=server.accept, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        recipe = load_recipe("laptop", [f"cluster.ray_address={address}"])
        preflight.check_host(recipe, tmp_path, ["grpo-aks"])


def test_wandb_online_without_a_login(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert "wandb login" in fault(tmp_path, "wandb.mode=online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    preflight.check_host(load_recipe("laptop", ["wandb.mode=online"]), tmp_path, ["sft"])


def test_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "FREE_BYTES", 1 << 62)
    assert "GiB free" in fault(tmp_path)


def test_a_missing_corpus(tmp_path):
    message = fault(tmp_path, "data.corpora=[{dataset: mevis, root: /nowhere/mevis}]")
    assert "no such corpus" in message and "/nowhere/mevis" in message


def test_a_model_folder_without_a_processor(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert str(tmp_path / "model") in fault(tmp_path, f"models.policy={tmp_path / 'model'}")


def test_an_unknown_reward(tmp_path):
    message = fault(tmp_path, "grpo_ktg.reward=nonsense")
    assert message.startswith("grpo_ktg.reward: nonsense: no such reward")


def test_an_unknown_prompt_set(tmp_path):
    assert "prompt set" in fault(tmp_path, "prompts=nonsense")


def test_a_segmenter_that_is_none(tmp_path):
    assert "Sam2Video" in fault(tmp_path, f"models.segmenter={tmp_path}")


def test_a_users_reward_is_held_to_its_contract_before_training(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(response, ground_truth):\n    return 'much'\n")
    message = fault(tmp_path, f"grpo_ktg.reward={file}:score", stages=["grpo-ktg"])
    assert "grpo_ktg.reward" in message and "rcot score --check" in message
    file.write_text("def score(response, ground_truth):\n    return 1 / (1 + len(response))\n")
    recipe = load_recipe("laptop", [f"grpo_ktg.reward={file}:score"])
    preflight.check_host(recipe, tmp_path, ["grpo-ktg"])
