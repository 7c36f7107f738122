"""The vision tower that shares images equals the same tower without sharing."""

import pytest
import torch
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as qwen
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from rcot_rl.training.shared_vision import distinct, share_vision

GRIDS = [[1, 4, 6], [1, 4, 6], [1, 6, 4], [2, 4, 4]]


def tower() -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=16,
        fullatt_block_indexes=[1],
        window_size=56,
        patch_size=14,
    )
    config._attn_implementation = "sdpa"
    return qwen.Qwen2_5_VisionTransformerPretrainedModel(config)


def media() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(t * h * w, 3 * 2 * 14 * 14) for t, h, w in GRIDS]


def run(
    model: torch.nn.Module, order: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return merged features, last hidden states and all gradients for media in `order`."""
    model.zero_grad()
    pixels = torch.cat([media()[i] for i in order])
    out = model(pixels, grid_thw=torch.tensor([GRIDS[i] for i in order]))
    features, hidden = out.pooler_output, out.last_hidden_state
    # every copy has its own weight, so that a gradient of only one copy would be noticed
    (features * torch.linspace(-1, 2, features.numel()).view_as(features)).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return features.detach(), hidden.detach(), gradients


@pytest.mark.parametrize(
    "order", [[0, 0, 0, 0], [0, 0, 1, 1], [3, 0, 3, 2, 2], [1, 0, 2, 3], [0]], ids=str
)
def test_outputs_and_gradients_equal_those_of_repeated_work(order: list[int]):
    expected = run(tower(), order)
    shared = tower()
    share_vision(shared)
    for shared_values, repeated_values in zip(run(shared, order), expected, strict=True):
        torch.testing.assert_close(shared_values, repeated_values, rtol=1e-4, atol=1e-4)


def test_the_tower_sees_each_distinct_image_once():
    model = tower()
    seen: list[int] = []
    model.patch_embed.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    share_vision(model)
    run(model, [0, 0, 1, 0, 1])
    assert seen == [len(media()[0]) + len(media()[1])]


def test_equal_values_of_another_shape_are_distinct():
    flat = torch.arange(24.0).view(24, 1)
    assert distinct((flat, flat), [[1, 4, 6], [1, 6, 4]]) == ([0, 1], [0, 1])
    assert distinct((flat, flat.clone()), [[1, 4, 6], [1, 4, 6]]) == ([0], [0, 0])
