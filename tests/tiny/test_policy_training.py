"""The training of the tiny base: the same numbers faster, and a resumed run equals a whole one."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from rcot_rl.tiny.fast_forward import fast_forward
from rcot_rl.tiny.patch_head import merged_cells
from rcot_rl.tiny.policy_data import NAMES, cells_of, make_clips
from rcot_rl.tiny.policy_model import (
    PATCH,
    PolicyEncoder,
    PolicySize,
    build_model,
    to_patches,
)
from rcot_rl.tiny.policy_train import (
    Buckets,
    PatchHeads,
    PretrainPlan,
    TrainState,
    learning_rate,
    loss_of,
    optimizers,
    train,
)
from rcot_rl.tiny.tokenizer import build_tokenizer

SMALL = PolicySize(
    hidden=32,
    layers=1,
    heads=1,
    intermediate=32,
    vision_hidden=32,
    vision_depth=1,
    vision_intermediate=32,
    vision_heads=1,
)
PLAN = replace(PretrainPlan(), batch=2, reuse=4, steps=6, warmup=2, constant=4)


@pytest.fixture(scope="module")
def encoder():
    return PolicyEncoder(build_tokenizer())


@pytest.mark.parametrize("number,media", [(0, "image"), (1, "video")])
def test_the_fast_forward_pass_gives_the_same_loss_and_gradients(encoder, number, media):
    slow = build_model(encoder.tokenizer, SMALL, 0)
    fast = copy.deepcopy(slow)
    fast_forward(fast)
    batch = next(Buckets(encoder, PLAN, 0).bucket(number))
    assert batch.media == media
    losses = [loss_of(model, batch) for model in (slow, fast)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    for one, other in zip(slow.named_parameters(), fast.named_parameters(), strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(one[1].grad, other[1].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("time", [1, 4])
def test_cells_are_in_the_order_of_merged_patches(time):
    """A clip whose patches have colours of their own shows where each of them goes."""
    rng = np.random.default_rng(3)
    colours = rng.permutation(256)[: time * 64].reshape(1, time, 8, 8)
    frames = np.repeat(np.repeat(colours, PATCH, 2), PATCH, 3)[..., None].repeat(3, -1)
    cells = np.zeros((1, time, 8, 8, 7), np.int64)
    cells[..., 0] = colours
    # [patches, channel, time, row, column] -> the red value of each patch in each of both frames
    patches = to_patches(frames.astype(np.uint8)).unflatten(1, (3, 2, PATCH, PATCH))[:, 0, :, 0, 0]
    values = (patches * 0.26862954 + 0.48145466) * 255
    expected = values.round().long().unflatten(0, (-1, 4)).transpose(1, 2).flatten(1)
    assert torch.equal(merged_cells(cells)[..., 0], expected)


def test_cells_say_which_box_covers_a_patch():
    for clip in make_clips([5], 12, "fleeting"):
        for now, cells in enumerate(cells_of(clip, range(8))):
            shown = {NAMES[n - 1] for n in np.unique(cells[..., 0]) if n}
            assert shown <= {clip.names[i] for i in clip.seen[now]}
            for row, column in np.argwhere(cells[..., 0]):
                name, x1, y1, x2, y2, frame, first = cells[row, column]
                index = clip.names.index(NAMES[name - 1])
                assert frame == now and first == min(t for t in range(8) if index in clip.seen[t])
                box = clip.seen[now][index].box
                assert np.abs(np.array([x1, y1, x2, y2]) * PATCH - box).max() <= PATCH / 2
                x, y = (column + 0.5) * PATCH, (row + 0.5) * PATCH
                assert box[0] <= x < box[2] and box[1] <= y < box[3]


def test_a_bucket_depends_on_its_number_alone(encoder):
    buckets = Buckets(encoder, PLAN, 0)
    once, again = next(buckets.bucket(3)), next(Buckets(encoder, PLAN, 3).bucket(3))
    assert torch.equal(once.ids, again.ids) and torch.equal(once.pixels, again.pixels)
    other = next(buckets.bucket(4))
    assert once.ids.shape != other.ids.shape or not torch.equal(once.ids, other.ids)


def test_a_resumed_training_equals_a_whole_one(encoder, tmp_path):
    batches = list(Buckets(encoder, PLAN, 0).bucket(0))[: PLAN.steps]

    def fresh() -> TrainState:
        model = build_model(encoder.tokenizer, SMALL, 0)
        fast_forward(model)
        torch.manual_seed(0)
        head = PatchHeads(model)
        return TrainState(model, head, optimizers(model, head, PLAN))

    whole = fresh()
    train(whole, encoder, iter(batches), PLAN, every=3, report=lambda step, _: None)
    part = fresh()

    class Stop(Exception):
        pass

    def report(step: int, losses: dict[str, float]) -> None:
        assert set(losses) == {"image", "image_patches"}
        part.save(tmp_path / "state")
        raise Stop

    with pytest.raises(Stop):
        train(part, encoder, iter(batches), PLAN, every=3, report=report)
    rest = fresh()
    rest.load(tmp_path / "state")
    assert rest.step == 3
    train(rest, encoder, iter(batches[3:]), PLAN, every=3, report=lambda step, _: None)
    for one, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_rate_rises_stays_and_falls():
    plan = PretrainPlan(steps=1000, warmup=10, constant=750)
    rates = [learning_rate(step, plan) for step in range(1000)]
    assert rates[0] == 0.1 and set(rates[9:751]) == {1.0}
    assert rates[999] == 0.01 and rates[750:] == sorted(rates[750:], reverse=True)
    assert rates[875] == pytest.approx(0.5)
