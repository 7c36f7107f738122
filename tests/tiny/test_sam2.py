"""The tiny SAM2: its training pass is the inference pass, and the shipped weights track."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from rcot_rl.segmentation.sam2 import Sam2Segmenter
from rcot_rl.segmentation.segmenter import TINY, load_segmenter
from rcot_rl.tiny import sam2_train
from rcot_rl.tiny.sam2_card import TrainingRun, judge, write_card
from rcot_rl.tiny.sam2_data import (
    PRESET_SHARES,
    LabelledClip,
    Sam2Stage,
    Track,
    draw_clip,
    draw_prompt,
    resize_clip,
    sample_batch,
)
from rcot_rl.tiny.sam2_eval import StaticBox, cases, evaluate
from rcot_rl.tiny.sam2_model import build_tiny_sam2, save_half
from rcot_rl.tiny.sam2_train import STAGES, ClipForward, mask_loss, train, train_step

SHORT = Sam2Stage("short", 2, 64, 2, 3, 2, 5e-4, 0.0)


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    return [draw_clip(rng) for _ in range(4)]


@pytest.fixture
def model():
    return build_tiny_sam2(64, seed=1)


def test_training_pass_equals_the_inference_session(model, pool):
    """Frame by frame logits of the differentiable pass and of transformers' own session."""
    model.eval()
    clip = resize_clip(LabelledClip(pool[0].frames[:6], pool[0].labels[:6]), 64)
    box, point = np.array([[8, 10, 40, 50]], np.float32), np.array([[20, 30]], np.float32)
    run = ClipForward(model, [clip], [Track(0, clip.labels == 1)])
    prompts = run.prompt(box, point, "both")
    segmenter = Sam2Segmenter(model, "random")
    session = segmenter._session(clip.frames, 0)
    segmenter._add_prompts(session, 0, box, point, (64, 64))
    with torch.no_grad():
        model(session, frame_idx=0)
        for out in model.propagate_in_video_iterator(session, start_frame_idx=0):
            logits, score = run.frame(out.frame_idx, prompts)
            if score.item() > 0:
                wanted = F.interpolate(out.pred_masks, (64, 64), mode="bilinear")
                assert torch.allclose(logits, wanted, atol=2e-2), out.frame_idx
            else:  # the session returns a constant if it sees no object
                assert (out.pred_masks < -100).all()
            run.remember(out.frame_idx, logits, score)
    assert out.frame_idx == 5


def test_gradients_reach_every_part_of_the_memory(model, pool):
    model.train()
    train_step(model, np.random.default_rng(2), pool, SHORT, 0.0).backward()
    for part in ("vision_encoder", "prompt_encoder", "mask_decoder", "memory_attention"):
        total = sum(
            p.grad.abs().sum() for p in getattr(model, part).parameters() if p.grad is not None
        )
        assert total > 0, part
    assert sum(p.grad.abs().sum() for p in model.memory_encoder.parameters()) > 0
    assert model.memory_temporal_positional_encoding.grad.abs().sum() > 0


def test_twelve_steps_lower_the_loss_on_one_batch(model, pool):
    single = Sam2Stage("single", 2, 64, 2, 1, 2, 5e-4, 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = train_step(model, np.random.default_rng(7), pool, single, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_positions_are_tied_and_seed_repeats_weights(model):
    shared = model.shared_image_embedding.positional_embedding
    assert torch.equal(shared, model.prompt_encoder.shared_embedding.positional_embedding)
    again = build_tiny_sam2(64, seed=1).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())


def test_weights_do_not_depend_on_the_side(model):
    build_tiny_sam2(128).load_state_dict(model.state_dict())


def test_saving_rounds_to_half_precision_only(model, tmp_path):
    save_half(model.state_dict(), 64, tmp_path / "out")
    loaded = load_segmenter(str(tmp_path / "out"))
    assert loaded.name == "sam2:out"
    weights = loaded.model.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(weights[key], value.half().float()), key


def test_same_seed_repeats_the_weights_and_stages_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(sam2_train, "POOL", 3)
    threads = torch.get_num_threads()
    frames = replace(SHORT, frames=1)
    for name in ("one", "two"):
        run = train(tmp_path / name, 3, (frames, SHORT))
    train(tmp_path / "start", 3, (replace(frames, steps=0), replace(SHORT, steps=0)))
    torch.set_num_threads(threads)
    one, two, start = (
        load_segmenter(str(tmp_path / name)).model.state_dict() for name in ("one", "two", "start")
    )
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert any(not torch.equal(value, start[key]) for key, value in one.items())
    card = (tmp_path / "one" / "README.md").read_text()
    assert "sam2_train --out DIR --seed 3\n\n2 + 2 steps" in card
    assert run.steps == (2, 2)
    assert "Not evaluated" in card


def test_card_has_the_measured_figures(tmp_path):
    run = TrainingRun(4, (10, 20), 30.1, 2_170_000)
    figures = judge(TINY, clips=1)
    write_card(tmp_path, run, figures)
    card = (tmp_path / "README.md").read_text()
    assert "sam2_train --out DIR --seed 4\n" in card
    assert "Not evaluated" not in card
    assert {path.name for path in tmp_path.iterdir()} == {"README.md"}
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| sam2:tiny-sam2")]
    wanted = [figures[preset]["sam2:tiny-sam2"]["j_video"] for preset in PRESET_SHARES]
    assert [float(row[2]) for row in rows] == pytest.approx(wanted, abs=6e-4)


def test_batches_start_with_a_visible_object(pool):
    for seed in range(5):
        clips, tracks = sample_batch(np.random.default_rng(seed), pool, STAGES[2])
        assert len(clips) == STAGES[2].clips
        for track in tracks:
            assert track.masks.shape == (5, 128, 128)
            assert track.masks[0].any()
            _, (x, y) = draw_prompt(np.random.default_rng(seed), track.masks[0])
            assert track.masks[0][int(y), int(x)]


def test_correct_mask_has_lower_loss_and_absence_counts_by_score():
    truth = torch.zeros(1, 1, 8, 8)
    truth[..., 2:5, 2:5] = 1
    sure = torch.tensor([8.0])
    right, wrong = 20 * truth - 10, 10 - 20 * truth
    assert mask_loss(right, truth, sure) < 0.01 < mask_loss(wrong, truth, sure)
    empty = torch.zeros_like(truth)
    assert torch.equal(mask_loss(right, empty, sure), mask_loss(wrong, empty, sure))
    assert mask_loss(right, empty, -sure) < mask_loss(right, empty, sure)


def test_held_out_cases_are_prompted_inside_the_object():
    for case in cases(3):
        x, y = case.point.astype(int)
        assert case.masks[case.key][y, x]


def test_shipped_weights_beat_the_static_box():
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 6 << 20
    with safe_open(TINY / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(k).get_dtype() for k in weights.keys()} == {"F16"}  # noqa: SIM118
    tiny, box = evaluate(load_segmenter("tiny"), 4), evaluate(StaticBox(), 4)
    assert tiny["j_video"] > max(0.85, box["j_video"] + 0.1)
    assert tiny["j_where_visible"] > box["j_where_visible"]
