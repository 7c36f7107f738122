"""The tiny policy's tokenizer is lossless, needs few tokens per answer and uses Qwen's turns."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rcot_rl.protocol.prompts import load_prompts
from rcot_rl.tiny.tokenizer import MAX_NUMBER, SPECIALS, build_tokenizer

TOKENIZER = build_tokenizer()

TRACE = (
    "<think>Scene: red circle at [14, 28, 42, 56], blue square hidden. "
    "Target: red circle.</think>\n"
    '<answer>[{"bbox_2d": [14, 28, 42, 56], "point_2d": [28, 42]}, '
    '{"bbox_2d": [0, 0, 112, 14], "point_2d": [7, 7]}]</answer>'
)


def pieces(text):
    return [TOKENIZER.decode([i]) for i in TOKENIZER(text)["input_ids"]]


@settings(deadline=None)
@given(st.text(max_size=60))
def test_every_text_round_trips(text):
    # lone surrogates are not text; special tokens are matched first and round-trip
    text = text.encode("utf-8", "ignore").decode("utf-8")
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_trace_round_trips():
    assert "".join(pieces(TRACE)) == TRACE


@pytest.mark.parametrize("number", range(MAX_NUMBER + 1))
def test_numbers_are_one_token(number):
    assert len(TOKENIZER(str(number))["input_ids"]) == 1
    assert pieces(f"[{number}, {number}]") == ["[", f"{number}, ", str(number), "]"]


def test_numbers_beyond_the_canvas_are_digits():
    assert pieces("840") == ["8", "4", "0"]


@pytest.mark.parametrize(
    "piece",
    ["<think>", "</think>\n", "<answer>", "</answer>", '[{"bbox_2d": [', '], "point_2d": [', "]}]"],
)
def test_json_and_tags_are_one_token(piece):
    assert piece in pieces(TRACE)


def test_prompts_of_the_recipe_need_no_bytes():
    prompts = load_prompts("compact")
    description = "first red circle, then blue square"
    texts = [
        prompts.vdg(8),
        prompts.kfg("the shape that appears last", 8),
        prompts.kfg_again("the red circle", 8, [(3, ""), (5, "")], description),
        prompts.aks(description, "all red shapes"),
        prompts.ktg(description, "both squares", canvas=112),
    ]
    for text in texts:
        assert not [p for p in pieces(text) if len(p) == 1 and p.isalpha() and p not in "AB"]


def test_special_tokens_of_qwen_are_one_token_each():
    for token in SPECIALS:
        assert len(TOKENIZER(token)["input_ids"]) == 1
    assert TOKENIZER.eos_token == "<|im_end|>"


def test_chat_template_of_text_image_and_video():
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "yes"}]
    text = TOKENIZER.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    for media in ("image", "video"):
        content = [{"type": media}, {"type": "text", "text": "Look."}]
        text = TOKENIZER.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert text == (
            f"<|im_start|>user\n<|vision_start|><|{media}_pad|><|vision_end|>Look.<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


def test_saved_tokenizer_is_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TRACE)["input_ids"] == TOKENIZER(TRACE)["input_ids"]
    assert loaded.chat_template == TOKENIZER.chat_template
