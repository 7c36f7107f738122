"""The preflight's estimates equal the sizes of files and the measured ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cluster.preflight.checks import estimates
from cluster.preflight.checks.case import GIB, HostFacts, RunCase
from cluster.preflight.checks.policy_facts import PUBLISHED, parameters_of, policy_facts
from rcot_rl.inference.model_folder import TINY
from rcot_rl.recipe.loader import load_recipe

HOST = HostFacts(2, 24 * GIB, 20 * GIB, 50 * GIB, 12 * GIB, None, None)


def case(recipe: str, *overrides: str) -> RunCase:
    return RunCase(load_recipe(recipe, list(overrides)), Path("/nowhere/run"), HOST)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


def test_parameters_by_formula_are_those_in_the_weights(tmp_path: Path) -> None:
    from_headers = policy_facts("tiny")
    assert from_headers.parameters == parameters_of(from_headers.shape)
    shutil.copy(TINY / "config.json", tmp_path / "config.json")
    from_config = policy_facts(str(tmp_path))
    assert from_config.parameters == from_headers.parameters
    assert "config.json" in from_config.derivation


def test_published_models_have_their_published_sizes() -> None:
    sizes = {name: parameters_of(shape) for name, shape in PUBLISHED.items()}
    assert sizes == {
        "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
        "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    }


@pytest.mark.parametrize("text", ["", "[]", '{"hidden_size": "x"}', '{"vision_config": {}}'])
def test_an_invalid_config_means_unknown_parameters(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    facts = policy_facts(str(tmp_path))
    assert facts.parameters is None and "unknown" in facts.derivation


def test_a_hub_model_in_the_cache_is_found_without_the_network(tmp_path: Path) -> None:
    model = tmp_path / "models--some--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    assert policy_facts("some/model").folder is None
    shutil.copytree(TINY, model / "snapshots" / "abc")
    facts = policy_facts("some/model")
    assert facts.folder == model / "snapshots" / "abc" and facts.parameters == 2_525_408


def test_a_checkpoint_has_16_bytes_a_parameter_as_on_disk() -> None:
    """Measured: 10153666 + 20305723 bytes of verl's, 10111136 of Hugging Face's, for 2525408."""
    measured = 10_153_666 + 20_305_723 + 10_111_136
    one = estimates.disk(case("laptop", "stages=[grpo-aks]", "train.grpo-aks.steps=12"))
    assert one.gib * GIB / 2 == pytest.approx(measured, rel=0.02)  # one kept, one being written


def test_host_memory_of_the_laptop_is_near_what_was_measured() -> None:
    """6.3 to 6.6 GiB, proportional set size of all processes (docs/results)."""
    assert 6.3 <= estimates.host_memory(case("laptop")).gib <= 8.0


def test_states_are_sharded_over_ranks_and_moved_by_offloading() -> None:
    four, eight = (case("rcot_seg_3b", f"cluster.gpus_per_node={n}") for n in (4, 8))
    train4, wait4 = estimates.states(four, four.recipe.grpo("grpo-ktg"))
    train8, _ = estimates.states(eight, eight.recipe.grpo("grpo-ktg"))
    assert train4.gib == pytest.approx(16 * 3_754_622_976 / 4 / GIB) == 2 * train8.gib
    assert wait4.gib == pytest.approx(0.75 * train4.gib), "gradients are gone between updates"
    away = case("rcot_seg_3b", "grpo.offload=all")
    train, wait = estimates.states(away, away.recipe.grpo("grpo-ktg"))
    assert (train.gib, wait.gib) == (train4.gib, 0.0)
    assert estimates.host_memory(away).gib > estimates.host_memory(four).gib


def test_an_update_of_the_3b_peaks_as_measured_on_one_gpu() -> None:
    """70.03 GiB allocated on an H200, whatever the micro-batch (docs/results/gpu/engine-h200)."""
    one = case("rcot_seg_3b_1gpu", "grpo.offload=none")
    section = one.recipe.grpo("grpo-aks")
    peak = estimates.states(one, section)[0].gib + estimates.optimizer_step(one, section).gib
    assert peak == pytest.approx(70.03, rel=0.01)


def test_activations_grow_with_the_micro_batch_and_the_engine_shrinks_with_its_ranks() -> None:
    one, two = (case("rcot_seg_3b", f"grpo.micro_batch_size={n}") for n in (1, 2))
    small, large = (estimates.activations(c, n, 5000) for c, n in ((one, 1), (two, 2)))
    assert small is not None and large is not None
    assert large.gib == pytest.approx(2 * small.gib)
    split = case("rcot_seg_3b", "grpo.tensor_parallel_size=2")
    whole = estimates.engine_need(one, one.recipe.grpo("grpo-ktg"))
    half = estimates.engine_need(split, split.recipe.grpo("grpo-ktg"))
    assert half.gib == pytest.approx(whole.gib / 2)


def test_every_estimate_shows_its_derivation() -> None:
    plan = estimates.plan(case("rcot_seg_3b"))
    for key in (
        "trainer, a rank",
        "activations, a rank",
        "rollout engine",
        "host memory, a node",
        "checkpoints",
        "shards",
    ):
        assert " x " in plan[key] or "(" in plan[key], key
    assert json.dumps(plan)


def test_an_adapter_has_the_parameters_of_its_matrices() -> None:
    """r x (in + out) of each of the seven linear layers, counted one by one for the 3B model."""
    lora = case("rcot_seg_3b", "grpo.lora_rank=64")
    a_layer = [
        (2048, 2048),
        (2048, 256),
        (2048, 256),
        (2048, 2048),
        (2048, 11008),
        (2048, 11008),
        (11008, 2048),
    ]
    expected = 36 * sum(64 * (i + o) for i, o in a_layer)
    assert estimates.adapter_parameters(lora, lora.recipe.grpo("grpo-ktg")) == expected
    whole = case("rcot_seg_3b")
    for pair in zip(
        estimates.states(lora, lora.recipe.grpo("grpo-ktg")),
        estimates.states(whole, whole.recipe.grpo("grpo-ktg")),
        strict=True,
    ):
        assert pair[0].gib < 0.5 * pair[1].gib
    assert estimates.disk(lora).gib < estimates.disk(whole).gib
