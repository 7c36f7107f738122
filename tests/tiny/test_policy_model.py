"""The fast inputs of the tiny policy equal those of its processor and model."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from rcot_rl.tiny.policy_model import (
    PolicyEncoder,
    PolicySize,
    build_model,
    hidden_states,
    save_policy,
)
from rcot_rl.tiny.tokenizer import build_tokenizer

SMALL = PolicySize(hidden=32, layers=1, heads=2, intermediate=32, vision_hidden=32, vision_depth=1)
FPS_OF_INTERVAL = {1: 2.0, 2: 1.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("policy")
    tokenizer = build_tokenizer()
    save_policy(build_model(tokenizer, SMALL, 0), tokenizer, out)
    processor = AutoProcessor.from_pretrained(out)
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    return processor, model.eval(), PolicyEncoder(tokenizer)


def processed(processor, media, prompts, frames, interval=1):
    turn = [{"type": media}, {"type": "text", "text": ""}]
    texts = []
    for prompt in prompts:
        turn[1]["text"] = prompt
        texts.append(
            processor.apply_chat_template(
                [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
            )
        )
    common = {"text": texts, "return_tensors": "pt", "padding": True, "padding_side": "left"}
    if media == "image":
        return processor(images=[[Image.fromarray(f[0])] for f in frames], **common)
    metadata = {
        "fps": FPS_OF_INTERVAL[interval],
        "total_num_frames": frames.shape[1],
        "frames_indices": list(range(frames.shape[1])),
    }
    return processor(
        videos=list(frames), videos_kwargs={"video_metadata": [metadata] * len(frames)}, **common
    )


@pytest.mark.parametrize("media,side", [("image", 112), ("image", 224), ("video", 112)])
def test_batch_equals_that_of_the_processor(saved, media, side):
    processor, _, encoder = saved
    shape = (2, 8 if media == "video" else 1, side, side, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    prompts = ["Describe the video.", "Query: the red circle.\nGive boxes and points."]
    reference = processed(processor, media, prompts, frames)
    batch = encoder.batch(prompts, None, frames)
    suffix = "_videos" if media == "video" else ""
    assert torch.equal(reference["input_ids"], batch.ids)
    assert torch.equal(reference["attention_mask"], batch.mask)
    assert torch.equal(reference[f"{media}_grid_thw"], batch.grid)
    torch.testing.assert_close(reference[f"pixel_values{suffix}"], batch.pixels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("media,interval", [("image", 1), ("video", 1), ("video", 2)])
def test_positions_equal_those_of_the_model(saved, media, interval):
    processor, model, encoder = saved
    shape = (2, 8 if media == "video" else 1, 112, 112, 3)
    frames = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    prompts = ["Describe the video.", "Give the best frame, 0 to 7, not 3."]
    reference = processed(processor, media, prompts, frames, interval)
    expected, _ = model.model.get_rope_index(
        reference["input_ids"],
        reference["mm_token_type_ids"],
        reference.get("image_grid_thw"),
        reference.get("video_grid_thw"),
        second_per_grid_ts=reference.get("second_per_grid_ts"),
        attention_mask=reference["attention_mask"],
    )
    batch = encoder.batch(prompts, None, frames, interval=interval, after="transformers")
    kept = batch.mask.bool()
    assert torch.equal(expected[:, kept], batch.positions[:, kept])


def test_text_after_a_video_follows_its_last_position_in_vllm(saved):
    encoder = saved[2]
    frames = np.zeros((1, 8, 112, 112, 3), np.uint8)
    batch = encoder.batch(["Describe the video."], None, frames, interval=2, after="vllm")
    start = int((batch.ids[0] == encoder.pad_of["video"]).nonzero()[0])
    # 4 temporal steps 2 apart: offsets 0, 2, 4, 6; the next text token is at 7.
    assert batch.positions[0, 0, start : start + 64].unique().tolist() == [
        start + t for t in (0, 2, 4, 6)
    ]
    assert batch.positions[:, 0, start + 64].tolist() == [start + 7] * 3


def test_padding_side_does_not_change_the_model(saved):
    _, model, encoder = saved
    frames = np.random.default_rng(2).integers(0, 256, (2, 1, 112, 112, 3)).astype(np.uint8)
    prompts = ["Describe the video.", "Query: the red circle.\nGive boxes and points."]
    with torch.no_grad():
        both = hidden_states(model, encoder.batch(prompts, None, frames)).last_hidden_state[:, -1]
        for row in range(2):
            alone = encoder.batch(prompts[row : row + 1], None, frames[row : row + 1])
            single = hidden_states(model, alone).last_hidden_state[0, -1]
            torch.testing.assert_close(both[row], single, rtol=1e-4, atol=1e-5)


def test_labels_cover_the_response_and_its_end(saved):
    encoder = saved[2]
    frames = np.zeros((2, 1, 112, 112, 3), np.uint8)
    batch = encoder.batch(["List the shapes."] * 2, ["A", "<answer>B</answer>"], frames)
    for row, response in enumerate(["A", "<answer>B</answer>"]):
        kept = batch.labels[row][batch.labels[row] != -100]
        assert encoder.tokenizer.decode(kept) == response + "<|im_end|>"


def test_weights_depend_only_on_the_seed():
    tokenizer = build_tokenizer()
    first, again, other = (build_model(tokenizer, SMALL, s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
