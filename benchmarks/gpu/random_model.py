"""Checkpoint folders of Qwen2.5-VL's published shapes, with random weights.

Tokenizer and chat template come from the shipped tiny model, with filler tokens up to the published
vocabulary size, so that vLLM and the trainer normalize over the same tokens. The processor has
Qwen's pixel limits.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from cluster.preflight.checks.policy_facts import PUBLISHED
from rcot_rl.inference.model_folder import TINY

SHAPES = {
    "3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "small": "",
    "tiny": "",
}
"""`tiny` is the shipped model's shape; `small` is the 3B with two layers, for trials on a CPU."""
DONE = ".complete"
LEAST_PIXELS, MOST_PIXELS = 56 * 56, 28 * 28 * 16384
_ROPE = {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default"}


def write_model(folder: Path, shape: str, device: str) -> Path:
    """Write a bf16 checkpoint of `shape` (a key of SHAPES), with weights drawn on `device`.

    A complete folder is reused.
    """
    if (folder / DONE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in TINY.iterdir():
        if file.suffix != ".safetensors" and file.name != "README.md":
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    if shape != "tiny":
        _enlarge(config, copy.deepcopy(PUBLISHED[SHAPES[shape] or SHAPES["3b"]]))
        _fill_vocabulary(folder / "tokenizer.json", config["text_config"]["vocab_size"])
    if shape == "small":
        _shrink(config)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _open_limits(folder / "processor_config.json")
    card = {"prompts": "qwen", "image_canvas": 840, "video_canvas": 448}
    (folder / "rcot.json").write_text(json.dumps(card))
    _draw(folder, device)
    (folder / DONE).touch()
    return folder


def _enlarge(config: dict[str, Any], published: dict[str, Any]) -> None:
    vision = published.pop("vision_config")
    text = config["text_config"]
    text |= published | {"rope_parameters": _ROPE, "rms_norm_eps": 1e-6, "initializer_range": 0.02}
    text["layer_types"] = ["full_attention"] * text["num_hidden_layers"]
    config["tie_word_embeddings"] = text["tie_word_embeddings"]
    config["vision_config"] |= vision | {
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "initializer_range": 0.02,
    }


def _shrink(config: dict[str, Any]) -> None:
    text, vision = config["text_config"], config["vision_config"]
    text |= {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512}
    text |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "layer_types": ["full_attention"] * 2,
    }
    vision |= {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
    vision |= {"out_hidden_size": 256, "fullatt_block_indexes": [1]}


def _fill_vocabulary(file: Path, size: int) -> None:
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    known = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocabulary |= {f"filler{i}": i for i in range(size) if i not in known}
    file.write_text(json.dumps(tokenizer))


def _open_limits(file: Path) -> None:
    processor = json.loads(file.read_text())
    for kind in ("image_processor", "video_processor"):
        processor[kind]["size"] = {"shortest_edge": LEAST_PIXELS, "longest_edge": MOST_PIXELS}
    file.write_text(json.dumps(processor, indent=1))


def _draw(folder: Path, device: str) -> None:
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # other processes of the benchmark need the memory
