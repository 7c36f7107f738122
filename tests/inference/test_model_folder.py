"""Checks before an engine starts: broken, foreign and unequal checkpoint folders."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest

from rcot_rl.errors import InputError
from rcot_rl.inference.engine import PolicyEngine
from rcot_rl.inference.model_folder import (
    PolicyCard,
    check_model,
    check_same_model,
    find_model,
    fingerprint,
    read_card,
    weight_shapes,
)
from rcot_rl.inference.policy import PolicyRequest
from rcot_rl.recipe.inference_section import EngineSection
from rcot_rl.tiny.policy_model import PolicySize, build_model, save_policy
from rcot_rl.tiny.tokenizer import build_tokenizer

SIZE = PolicySize(
    hidden=32, layers=1, heads=2, intermediate=32, vision_depth=1, vision_intermediate=32
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    tokenizer = build_tokenizer()
    save_policy(build_model(tokenizer, SIZE, 0), tokenizer, folder)
    return folder


@pytest.fixture
def model(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "m")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_whole_folder_passes(model):
    check_model(model)
    embeddings = [s for n, s in weight_shapes(model).items() if n.endswith("embed_tokens.weight")]
    assert embeddings == [(len(build_tokenizer()), 32)]


def test_a_models_fingerprint_is_its_weights_and_not_its_place(model, whole):
    assert fingerprint(model) == fingerprint(whole)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(model) != fingerprint(whole)


@pytest.mark.parametrize(
    "missing",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "model.safetensors",
        "chat_template.jinja",
    ],
)
def test_a_missing_file_is_named_before_vllm_is_imported(model, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it now raises ImportError
    (model / missing).unlink()
    with pytest.raises(InputError) as caught:
        PolicyEngine(model, EngineSection(), device="cpu")
    named = "preprocessor_config.json" if missing == "processor_config.json" else missing
    assert caught.value.file == str(model / named)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        PolicyEngine(tmp_path / "none", EngineSection(), device="cpu")


def test_truncated_weights_are_named(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="unreadable weights") as caught:
        check_model(model)
    assert caught.value.file == str(weights)


def test_a_missing_part_of_sharded_weights_is_named(model):
    table = {"weight_map": {"a": "part-1.safetensors", "b": "../../part-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(table))
    (model / "model.safetensors").rename(model / "part-1.safetensors")
    with pytest.raises(InputError) as caught:
        check_model(model)
    assert caught.value.file == str(model / "part-2.safetensors")


def test_another_architecture_is_named(model):
    edit(model / "config.json", model_type="llama")
    with pytest.raises(InputError, match=r"not a Qwen2\.5-VL model") as caught:
        check_model(model)
    assert caught.value.key == "model_type"


def test_a_broken_config_is_named(model):
    (model / "config.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        check_model(model)


def test_weights_may_change_and_nothing_else(whole, model):
    check_same_model(whole, model)
    edit(model / "config.json", transformers_version="9.9", use_cache=False)
    check_same_model(whole, model)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        check_same_model(whole, model)
    assert caught.value.key == "text_config.rms_norm_eps"


def test_another_vocabulary_is_refused(whole, model):
    text = (model / "tokenizer.json").read_text()
    assert "Ġcircle" in text
    (model / "tokenizer.json").write_text(text.replace('"Ġcircle"', '"Ġcirclx"'))
    with pytest.raises(InputError, match="vocabulary differs"):
        check_same_model(whole, model)


def test_another_chat_template_is_refused(whole, model):
    (model / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match="chat template differs"):
        check_same_model(whole, model)


def test_other_tensors_are_refused(whole, model):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = np.zeros((3, 3), np.float32)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(InputError, match=r"tensor is \(3, 3\), the engine's is") as caught:
        check_same_model(whole, model)
    assert caught.value.key == name


def test_names_and_paths_resolve_to_model_folders(tmp_path):
    assert find_model("tiny").name == "tiny-qwen2.5-vl"
    assert find_model("tiny-trained").name == "tiny-rcot-seg"
    assert find_model(tmp_path) == tmp_path
    assert find_model("./none") == find_model("none").parent / "none"


def test_a_checkpoints_card_is_read(model):
    (model / "rcot.json").unlink(missing_ok=True)
    assert read_card(model) is None
    (model / "rcot.json").write_text('{"prompts": "compact", "image_canvas": 112}')
    assert read_card(model) == PolicyCard(prompts="compact", image_canvas=112, video_canvas=448)
    (model / "rcot.json").write_text('{"canvas": 112}')
    with pytest.raises(InputError, match=r"rcot\.json") as caught:
        read_card(model)
    assert caught.value.key == "canvas"


def test_a_request_has_one_medium():
    image = np.zeros((28, 28, 3), np.uint8)
    with pytest.raises(ValueError, match="either"):
        PolicyRequest("x")
    with pytest.raises(ValueError, match="either"):
        PolicyRequest("x", image=image, video=image[None])
