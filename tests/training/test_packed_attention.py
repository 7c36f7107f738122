"""A packed row has each prompt once and gives the outputs and gradients of separate sequences."""

import random

import pytest
import torch
import torch.nn.functional as F

from rcot_rl.training.packed_attention import attend_in_row, leaders_of, packed_row

CASES = {
    "two groups": ([9, 7, 12, 5, 5], [4, 2, 7, 3, 3], [0, 0, 0, 3, 3]),
    "nothing shared": ([4, 11, 3], [1, 5, 2], [0, 1, 2]),
    "one sequence": ([6], [2], [0]),
    "groups not adjacent": ([8, 30, 9, 31], [3, 20, 4, 21], [0, 1, 0, 1]),
}
"""Lengths, response lengths and leaders."""


def tokens_of(lengths: list[int], responses: list[int], leaders: list[int]) -> list[tuple]:
    """Return an identity of each of all tokens: equal where a prompt is repeated."""
    return [
        ("prompt", leaders[i], t) if t < length - response else ("response", i, t)
        for i, (length, response) in enumerate(zip(lengths, responses, strict=True))
        for t in range(length)
    ]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_row_has_each_prompt_once_and_every_response(case):
    row, everywhere = packed_row(*case), tokens_of(*case)
    tokens = [everywhere[i] for i in row.kept]
    assert len(tokens) == len(set(tokens)) and set(tokens) == set(everywhere)
    assert [tokens[i] for i in row.place] == everywhere
    assert row.leaders == sorted(set(case[2]))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_token_before_each_response_token_predicts_it(case):
    everywhere = tokens_of(*case)
    predicted = [everywhere[i + 1] for i in packed_row(*case).predicting]
    assert predicted == [token for token in everywhere if token[0] == "response"]


@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_and_gradients_equal_those_of_each_sequence_alone(key_heads: int):
    generator = random.Random(0)
    leaders = [i - i % 4 for i in range(12)]
    prompts = [generator.randrange(1, 20) for _ in range(12)]
    responses = [generator.randrange(1, 40) for _ in range(12)]
    lengths = [prompts[j] + r for j, r in zip(leaders, responses, strict=True)]
    row = packed_row(lengths, responses, leaders)
    torch.manual_seed(0)
    heads, size = (4, key_heads, key_heads), 8
    packed = [torch.randn(1, h, len(row.kept), size).requires_grad_() for h in heads]
    layer = torch.nn.Module()
    layer.config = type("Config", (), {"packed_row": row})()
    out, _ = attend_in_row(layer, *packed, None, scaling=0.3)
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weights).sum(), packed)

    places = row.place.split(lengths)
    expected = torch.zeros_like(out)
    for i, at in enumerate(places):
        q, k, v = (x[:, :, at] for x in packed)
        alone = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=0.3, enable_gqa=True
        ).transpose(1, 2)
        new = 0 if leaders[i] == i else prompts[leaders[i]]
        expected = expected.index_copy(1, at[new:], alone[:, new:])
    torch.testing.assert_close(out, expected)
    for one, other in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), packed), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_only_equal_prompts_positions_and_media_are_shared():
    ids, pixels = torch.arange(5), torch.ones(2, 3)
    positions, media = torch.arange(5).expand(4, 5), {"pixel_values": pixels}
    rows = [
        (ids, positions, media),
        (ids.clone(), positions.clone(), {"pixel_values": pixels.clone()}),
        (ids + 1, positions, media),
        (ids, positions + 1, media),
        (ids, positions, {"pixel_values": pixels * 2}),
        (ids, positions, {}),
        (ids, positions, media),
    ]
    columns = [list(column) for column in zip(*rows, strict=True)]
    assert leaders_of(*columns) == [0, 0, 2, 3, 4, 5, 0]


WORKER = """
import os, random, sys
os.environ |= dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
import verl, torch
from pathlib import Path
from tensordict import NonTensorStack, TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import response_from_nested
from rcot_rl.inference.model_folder import find_model
from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training.verl_config import grpo_config

def batch():
    torch.manual_seed(0)
    generator, rows = random.Random(0), []
    for _ in range(3):
        pixels = torch.randn(64, 1176)
        words = torch.randint(20, 500, (generator.randrange(10, 40),))
        prompt = torch.cat([torch.tensor([3, *[6] * 16, 4]), words])
        for _ in range(4):
            n = generator.randrange(1, 60)
            answer, length = torch.randint(20, 500, (n,)), len(prompt) + n
            rows.append(dict(prompts=prompt, responses=answer,
                input_ids=torch.cat([prompt, answer]),
                position_ids=torch.arange(length).expand(4, length).clone(),
                response_mask=torch.ones(n, dtype=torch.int64),
                loss_mask=torch.ones(n, dtype=torch.int64),
                advantages=torch.randn(()).expand(n).clone(),
                multi_modal_inputs=dict(pixel_values=pixels,
                    image_grid_thw=torch.tensor([[1, 8, 8]]), images_seqlens=torch.tensor([64]))))
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    fields = dict(
        position_ids=tu.nested_tensor_from_tensor_list(columns.pop("position_ids"), ragged_idx=2),
        multi_modal_inputs=NonTensorStack(*columns.pop("multi_modal_inputs")))
    for key, values in columns.items():
        fields[key] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
    return TensorDict(fields, batch_size=[len(rows)])

def outputs(packing):
    recipe = load_recipe("laptop", [f"grpo.packing={packing}", "grpo.temperature=0.7",
        "grpo.prompts_per_step=3", "grpo.n=4", "grpo.micro_batch_size=6"])
    folder = Path(".")
    config = grpo_config(recipe, "grpo-aks", model=find_model("tiny"), train=[folder],
        val=[folder], out=folder).actor_rollout_ref
    worker = ActorRolloutRefWorker(config, role="actor")
    worker.init_model()
    data = batch()
    tu.assign_non_tensor(data, temperature=0.7, compute_loss=False, calculate_entropy=True,
        micro_batch_size_per_gpu=6)
    out = worker.compute_log_prob(data.clone(recurse=False))
    of_responses = [response_from_nested(out[key], data["response_mask"])
                    for key in ("log_probs", "entropy")]
    data["old_log_probs"] = data["ref_log_prob"] = of_responses[0]
    tu.assign_non_tensor(data, global_batch_size=12, mini_batch_size=12, epochs=1, seed=1,
        dataloader_kwargs={"shuffle": False}, compute_loss=True)
    norm = tu.get(worker.update_actor(data), "metrics")["grad_norm"]
    weights = worker.actor.engine.module.state_dict()
    weights = torch.cat([w.full_tensor().flatten() for w in weights.values()])
    return of_responses, float(norm[-1] if isinstance(norm, list) else norm), weights

(padded, norm, weights), (packed, packed_norm, packed_weights) = outputs("false"), outputs("true")
print(max(float((a.values() - b.values()).abs().max()) for a, b in zip(padded, packed)),
      abs(norm / packed_norm - 1), float((weights - packed_weights).abs().max()), norm)
"""


@pytest.mark.slow
def test_verls_worker_gives_the_same_log_probs_and_update_with_packing(run_verl_python):
    """Entropies, gradient norm and new weights too; groups are split over micro-batches here."""
    out = run_verl_python(WORKER, MASTER_PORT="29591")
    values, norm_ratio, weights, norm = map(float, out.split()[-4:])
    assert values < 1e-4
    assert norm > 0.01 and norm_ratio < 1e-4
    assert weights < 1e-4  # Adam's first step divides by the gradient: 8e-5 is the largest change
