"""The shipped tiny policy loads like any Qwen2.5-VL and perceives better than chance."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import rcot_rl
from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.tiny.policy_data import make_clips
from rcot_rl.tiny.policy_eval import figures
from rcot_rl.tiny.policy_model import PolicyEncoder

SHIPPED = Path(rcot_rl.__file__).parent / "assets" / "tiny-qwen2.5-vl"


@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(SHIPPED)
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED, dtype=torch.float32)
    return processor, model.eval()


@pytest.fixture(scope="module")
def clips():
    return make_clips([31337], 48)


def ask(shipped, media, text, frames):
    """Return one greedy answer through the processor and `generate` of transformers."""
    processor, model = shipped
    turn = {"role": "user", "content": [{"type": media}, {"type": "text", "text": text}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    if media == "image":
        inputs = processor(text=[prompt], images=[Image.fromarray(frames[0])], return_tensors="pt")
    else:
        metadata = {"fps": 2.0, "total_num_frames": len(frames), "frames_indices": [*range(8)]}
        inputs = processor(
            text=[prompt],
            videos=[frames],
            videos_kwargs={"video_metadata": [metadata]},
            return_tensors="pt",
        )
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=96, do_sample=False)
    response = out[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(response, skip_special_tokens=True)


def test_folder_is_small_and_complete():
    names = {f.name for f in SHIPPED.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 10 * 2**20


def test_images_up_to_the_largest_side_stay_unchanged(shipped):
    processor = shipped[0]
    for side in (56, 112, 224):
        image = Image.fromarray(np.zeros((side, side, 3), np.uint8))
        grid = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"]
        assert grid.tolist() == [[1, side // 14, side // 14]]
    large = Image.fromarray(np.zeros((480, 640, 3), np.uint8))
    grid = processor.image_processor(images=[large], return_tensors="pt")["image_grid_thw"]
    assert grid.prod() <= (224 // 14) ** 2


def test_perception_is_better_than_chance(shipped, clips):
    processor, model = shipped
    scores = figures(model, PolicyEncoder(processor.tokenizer), clips, load_prompts("compact"))
    # a random description is correct once in thousands; a random box has an IoU of metadata 0.1
    assert scores["vdg_exact"] > 0.75
    assert scores["detection_iou"] > 0.95
    assert scores["presence"] > 0.95
    assert scores["kfg_visible"] > 0.95 > scores["kfg_visible_chance"]


def test_generate_of_transformers_gives_the_same_answers(shipped, clips):
    """`figures` uses our own batches; the processor and `generate` must agree."""
    correct = 0
    for clip in clips[:12]:
        answer = ask(shipped, "video", load_prompts("compact").vdg(8), clip.frames)
        correct += answer == clip.description
        if len(clip.seen[0]) == len(clip.names):
            text = f"Video: {clip.description}.\nList the shapes."
            assert ask(shipped, "image", text, clip.frames[:1]).startswith("Scene: ")
    assert correct >= 9
