"""Held-out rewards with a scripted policy and the shipped rewards."""

from __future__ import annotations

import asyncio
import json

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rcot_rl.errors import InputError
from rcot_rl.inference.heldout import heldout_requests, read_rows, score_heldout
from rcot_rl.inference.policy import PolicyResponse, Sampling, gather_texts
from rcot_rl.monitoring.run_files.rollout_files import groups_of, read_rollout_file
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.stages.predict_stage import heldout_reward
from reward_fns.score import load_reward

RIGHT = "<think>.</think><answer>A</answer>"


def png(value=0) -> bytes:
    return cv2.imencode(".png", np.full((112, 112, 3), value, np.uint8))[1].tobytes()


def row(index=0, truth="A", image=None):
    return {
        "data_source": "aks",
        "prompt": [{"role": "user", "content": f"<image>Is frame {index} valid?"}],
        "images": [image or {"bytes": png(index), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": json.dumps(truth)},
        "extra_info": {"task": "aks", "index": 100 + index},
    }


class TurnPolicy:
    """Alternate right and wrong samples; a greedy answer is right only on the first prompt."""

    def __init__(self):
        self.seen = []

    async def generate(self, request, sampling, started=None):
        self.seen.append((request, sampling))
        if sampling.temperature == 0:
            return [PolicyResponse(RIGHT if request.text == "Is frame 0 valid?" else "B")]
        return [PolicyResponse(RIGHT), PolicyResponse("B")] * (sampling.n // 2)


def heldout_rewards(policy, rows, reward, k=4, seed=0, count=None):
    """Ask and score as the predict stage does."""
    requests = heldout_requests(rows, seed)

    async def ask():
        sampled = await gather_texts(policy, requests, Sampling(99, n=k, temperature=1.0))
        return sampled, await gather_texts(policy, requests, Sampling(99))

    return score_heldout(rows, *asyncio.run(ask()), reward, count).rewards


def test_rewards_have_means_components_and_prompt_names():
    policy = TurnPolicy()
    rewards = heldout_rewards(policy, [row(0), row(1), row(2, "B")], load_reward("aks"), k=4)
    assert rewards["prompts"] == ["100", "101", "102"]
    # right and formed is 3; "B" without tags has no answer, so it scores 0 whatever is right;
    # the well-formed A keeps its format point where B is right
    assert rewards["sampled"]["per_prompt"] == [1.5, 1.5, 0.5]
    assert rewards["sampled"]["mean"] == pytest.approx(3.5 / 3)
    assert rewards["sampled"]["components"] == {"format": 0.5, "accuracy": pytest.approx(1 / 3)}
    assert rewards["components"] == rewards["sampled"]["components"]
    assert rewards["greedy"]["per_prompt"] == [3.0, 0.0, 0.0]
    (_, drawn), (_, greedy) = policy.seen[0], policy.seen[-1]
    requests = [request for request, _ in policy.seen]
    assert (drawn.n, drawn.temperature, greedy.n, greedy.temperature) == (4, 1.0, 1, 0.0)
    assert requests[1].text == "Is frame 1 valid?"
    assert (requests[1].image == 1).all() and requests[1].image.shape == (112, 112, 3)


def test_every_call_sends_the_same_requests_with_the_same_seeds():
    first, second, third = TurnPolicy(), TurnPolicy(), TurnPolicy()
    rows = [row(i) for i in range(4)]
    heldout_rewards(first, rows, load_reward("aks"))
    heldout_rewards(second, rows[:2], load_reward("aks"))
    heldout_rewards(third, rows, load_reward("aks"), seed=1)
    seeds = [
        [r.seed for r, sampling in policy.seen if sampling.n > 1]
        for policy in (first, second, third)
    ]
    assert seeds[1] == seeds[0][:2]
    assert len(set(seeds[0])) == 4
    assert not set(seeds[0]) & set(seeds[2])


def test_a_part_of_the_rows_sends_the_requests_of_the_whole():
    rows = [row(i) for i in range(5)]
    seeds = [request.seed for request in heldout_requests(rows, 3)]
    parts = [heldout_requests(rows, 3, first, first + 2) for first in (0, 2, 4)]
    assert [request.seed for part in parts for request in part] == seeds


def test_rows_are_read_from_a_shard(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "7.png").write_bytes(png(7))
    rows = [row(i, image={"image": "media/7.png"}) for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "val.parquet")
    read = read_rows([tmp_path / "val.parquet"], limit=2)
    assert len(read) == 2
    policy = TurnPolicy()
    heldout_rewards(policy, read, load_reward("aks"))
    assert (policy.seen[0][0].image == 7).all()


def bad_rows():
    no_prompt, two_turns, no_image, text_image = row(), row(), row(), row()
    del no_prompt["prompt"]
    two_turns["prompt"] *= 2
    no_image["images"] = [{"path": "/nowhere/x.png"}]
    text_image["images"] = [{"bytes": b"text"}]
    elsewhere, truth = row(), row(truth="C")
    elsewhere["prompt"][0]["content"] = "Is <image> valid?"
    no_truth = row()
    del no_truth["reward_model"]["ground_truth"]
    return {
        "prompt": (no_prompt, "row 1: prompt"),
        "turns": (two_turns, "row 1: prompt"),
        "image": (no_image, "row 1: images"),
        "pixels": (text_image, "row 1: images"),
        "place": (elsewhere, "row 1: prompt"),
        "truth": (truth, "row 1: ground_truth"),
        "none": (no_truth, "row 1: reward_model.ground_truth"),
    }


@pytest.mark.parametrize("kind", bad_rows())
def test_bad_rows_are_named(kind):
    bad, key = bad_rows()[kind]
    with pytest.raises(InputError) as caught:
        heldout_rewards(TurnPolicy(), [row(), bad], load_reward("aks"))
    assert caught.value.key == key


def test_bad_shards_are_named(tmp_path):
    broken = tmp_path / "a.parquet"
    with pytest.raises(InputError, match=r"a\.parquet: no such shard"):
        read_rows([broken])
    broken.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="not a readable parquet"):
        read_rows([broken])
    pq.write_table(pa.table({"images": pa.array([], pa.list_(pa.string()))}), broken)
    with pytest.raises(InputError, match="no rows"):
        read_rows([broken])


def test_a_reward_gets_the_same_row_keys_as_in_training(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def f(response, ground_truth, response_length, num_turns):\n"
        "    return response_length + 100 * num_turns\n"
    )
    reward = load_reward(f"{path}:f")
    try:
        rewards = heldout_rewards(TurnPolicy(), [row(0)], reward, k=2, count=lambda text: len(text))
    finally:
        reward.close()
    assert rewards["greedy"]["per_prompt"] == [len(RIGHT) + 1 + 200]


def test_an_agentic_stages_rows_are_single_questions():
    """Its own reward is of episodes, and refuses them."""
    agentic = load_recipe("rcot_seg_3b_agentic")
    aks = agentic.grpo("grpo-aks")
    assert aks.reward == "aks-agentic"
    assert [heldout_reward(s) for s in agentic.grpo_stages.values()] == ["aks", "ktg"]
    with pytest.raises(InputError, match="agentic"):
        heldout_rewards(TurnPolicy(), [row(0)], load_reward(aks.reward), k=2)
    rewards = heldout_rewards(TurnPolicy(), [row(0)], load_reward(heldout_reward(aks)), k=2)
    assert rewards["greedy"]["mean"] == 3.0


def test_scored_responses_are_kept_in_the_format_of_rollouts(tmp_path):
    rows = [row(0), row(1), row(2, "B")]
    sampled, greedy = [[RIGHT, "B"]] * 3, [[RIGHT]] * 3
    scored = score_heldout(rows, sampled, greedy, load_reward("aks"), len)
    kept = {}
    for way, lines in scored.responses.items():
        file = tmp_path / f"{way}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        kept[way] = read_rollout_file(file)
    assert [r.prompt_id for r in kept["greedy"]] == scored.rewards["prompts"]
    assert [r.reward for r in kept["greedy"]] == scored.rewards["greedy"]["per_prompt"]
    means = [np.mean([r.reward for r in g]) for g in groups_of(kept["sampled"]).values()]
    assert means == scored.rewards["sampled"]["per_prompt"]
    wrong = kept["greedy"][2]
    assert (wrong.answer, wrong.truth, wrong.index, wrong.task) == ("A", "B", 102, "aks")
    assert wrong.tokens == len(RIGHT) + 1
    assert wrong.reasons == ["option_wrong"]
