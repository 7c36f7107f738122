"""Token counts equal those of transformers' processor for the same row."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.tokens import TokenCounter, pixel_limits, token_statistics
from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import TINY

TEXTS = st.text(
    st.characters(exclude_categories=("Cs",)).filter(lambda c: c not in "<>|"), max_size=80
)


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def counter() -> TokenCounter:
    return TokenCounter(TINY)


@pytest.mark.parametrize("canvas", [28, 112, 196])
@settings(max_examples=40, deadline=None)
@given(question=TEXTS, response=TEXTS)
def test_counts_equal_those_of_the_processor(processor, counter, canvas, question, response):
    image = Image.new("RGB", (canvas, canvas))
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question + "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": response + "."}]},
    ]

    def length(messages, generate):
        text = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )
        taken = processor(text=[text], images=[image], return_tensors="np")
        return taken["input_ids"].shape[1]

    counted = counter.lengths(
        [{"role": "user", "content": f"<image>{question}?"}], response + ".", canvas
    )
    assert counted == ((canvas // 28) ** 2, length(turns[:1], True), length(turns, False))


def test_a_canvas_that_would_be_resized_is_refused(counter):
    for canvas in (840, 113):
        with pytest.raises(InputError, match="would be resized"):
            counter.lengths([{"role": "user", "content": "<image>x"}], None, canvas)


def test_the_widely_copied_limit_makes_756_of_840(tmp_path):
    config = {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 602112}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="705600 pixels is outside"):
        pixel_limits(tmp_path).vision_tokens(840, 840)
    assert pixel_limits(tmp_path).vision_tokens(756, 756) == 27 * 27


@pytest.mark.parametrize("gone", ["tokenizer.json", "chat_template.jinja", "processor_config.json"])
def test_missing_model_files_are_named(tmp_path, gone):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", gone))
    with pytest.raises(InputError):
        TokenCounter(folder)


def test_a_template_cannot_reach_python(tmp_path):
    shutil.copytree(TINY, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "m" / "chat_template.jinja").write_text(
        "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    )
    with pytest.raises(Exception, match=r"unsafe|undefined|access"):
        TokenCounter(tmp_path / "m").lengths([{"role": "user", "content": "x"}], None, 112)


def test_token_statistics_name_the_rows_over_a_limit(counter):
    lengths = {"train": [[16, 50, 90], [16, 61, 120], [16, 40, 70]], "val": []}
    counted = token_statistics(lengths, {"prompt_tokens": 60, "total_tokens": 119}, counter)
    assert counted["over"] == {"prompt_tokens": ["train:1"], "total_tokens": ["train:1"]}
    spread = counted["splits"]["train"]["prompt_tokens"]
    assert (spread["least"], spread["most"], spread["mean"]) == (40, 61, 50.33)
    assert sum(n for _, _, n in spread["histogram"]) == 3
    assert token_statistics(lengths, {}, None) is None
