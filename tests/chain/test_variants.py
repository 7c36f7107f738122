"""The recipes' variants of GRPO on the real stack, two or three steps each, from one SFT model."""

from __future__ import annotations

import json

import pytest

from reward_fns.score import load_reward

pytestmark = pytest.mark.drill


def rollouts(stage, step: int) -> list[dict]:
    text = (stage / "rollouts" / f"{step}.jsonl").read_text()
    return [json.loads(row) for row in text.splitlines()]


def aligned(steps: list[dict]) -> None:
    """Assert that engine and trainer agree on the probabilities of samples, after each sync too."""
    for step in steps:
        assert step["training/rollout_probs_diff_max"] < 1e-3, step["step"]


def test_agentic_rewards_belong_to_whole_episodes(variant):
    steps, stage = variant(
        "grpo-aks",
        "train.grpo-aks.agent=agentic-aks",
        "train.grpo-aks.reward=aks-agentic",
        "train.grpo-aks.steps=2",
        "predict.rounds=2",
    )
    aligned(steps)  # judgements show images, re-selections the clip as a video
    rows = [row for step in (1, 2) for row in rollouts(stage, step)]
    turns: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        turns.setdefault((row["prompt_id"], row["sample"]), []).append(row)
    assert len(turns) == 2 * 4 * 8
    assert all(step["group/lost_fraction"] == 0 for step in steps)
    assert any(len(t) > 1 for t in turns.values()), "some frame was refused"
    reward = load_reward("aks-agentic")
    for of_response in turns.values():
        last = max(of_response, key=lambda row: row["turn"])
        outcome = last["extra_info"]["agentic"]
        assert len(of_response) in (2 * outcome["judgements"] - 1, 2 * outcome["judgements"])
        assert json.loads(last["ground_truth"]) == outcome["truth"]
        other = {key: last[key] for key in last.keys() - {"response", "ground_truth"}}
        again = reward.score(last["response"], last["ground_truth"], **other)
        assert last["reward"] == pytest.approx(again.reward)
        assert {row["reward"] for row in of_response} == {last["reward"]}
        assert all(row["response_tokens"] > 0 for row in of_response)
        assert len({round(row["advantage"], 5) for row in of_response}) == 1


def test_many_workers_return_every_response_of_every_group(variant):
    """As on a host with GPUs: several processes ask the engine at once, score, keep the data."""
    steps, stage = variant(
        "grpo-aks",
        "train.grpo-aks.steps=2",
        "cluster.agent_workers=4",
        "cluster.reward_workers=3",
        "cluster.queue_storage_units=3",
    )
    aligned(steps)
    for step in (1, 2):
        rows = rollouts(stage, step)
        assert len({(row["prompt_id"], row["sample"]) for row in rows}) == 4 * 8
        assert all(row["response"] for row in rows)


def test_lora_trains_an_adapter_and_publishes_a_merged_model(variant):
    steps, stage = variant("grpo-aks", "grpo.lora_rank=8", "train.grpo-aks.steps=3")
    aligned(steps)
    assert steps[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-6), "the adapter starts at nothing"
    assert steps[2]["actor/kl_loss"] > 1e-6, "and has moved; the engine's with it (aligned)"
    import torch
    from safetensors.torch import load_file

    base = load_file(stage.parent / "sft/model/model.safetensors")
    trained = load_file(stage / "model/model.safetensors")
    assert base.keys() == trained.keys(), "a plain model, whole"
    moved = {name for name in base if not torch.equal(base[name], trained[name])}
    assert moved and not any("visual" in name for name in moved)


def test_dynamic_sampling_on_joint_tasks_leaves_no_group_without_variance(variant):
    steps, stage = variant(
        "grpo-ktg",
        "train.grpo-ktg.after=sft",
        "train.grpo-ktg.reward=joint",
        "train.grpo-ktg.advantage=task",
        "train.grpo-ktg.dynamic_sampling=true",
        "train.grpo-ktg.steps=2",
    )
    aligned(steps)
    for step in steps:
        assert step["group/zero_variance_fraction"] == 0, "such groups were sampled again"
    sources = {row["data_source"] for n in (1, 2) for row in rollouts(stage, n)}
    assert sources == {"rcot/aks", "rcot/ktg"}


def test_asynchronous_rollouts_complete_every_step(variant):
    steps, _ = variant("grpo-aks", "grpo.rollouts=colocate-async", "train.grpo-aks.steps=3")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["training/rollout_actor_probs_pearson_corr"] > 0.9 for step in steps)
