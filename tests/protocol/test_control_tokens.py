"""Control tokens in foreign text never reach a prompt or a target; clean text is unchanged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.tokens import TokenCounter, read_template, read_tokenizer
from data_pipelines.traces.texts import response
from rcot_rl.errors import InputError
from rcot_rl.inference.model_folder import TINY
from rcot_rl.protocol.control_tokens import (
    control_ids,
    control_tokens,
    extra_control_tokens,
    neutralize,
    surplus_tokens,
)
from rcot_rl.protocol.parser import TAGS, parse_response
from rcot_rl.protocol.prompts import SHIPPED, TASKS, Prompts, load_prompts, user_turn
from rcot_rl.tiny.tokenizer import SPECIALS

QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_ADDED = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
"""Qwen2.5-VL's added tokens as published: special ones, and those not marked as special."""
FOREIGN = ("[SEG]", "<s>", "<｜User｜>", "<|odd name|>", "EOT", "<unk>")
"""Special tokens of other tokenizers, which the static pattern does not cover."""
PLACEHOLDERS = ("<image>", "<video>", "<audio>")
KNOWN = tuple(dict.fromkeys([*SPECIALS, *QWEN_SPECIAL, *QWEN_ADDED]))

pieces = st.sampled_from(["<|", "|>", "<", ">", "|", "im_end", "image", "[", "]", "(", "E", " "])
ordinary = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


def texts_of(*tokens: str) -> st.SearchStrategy[str]:
    """Return a strategy of tokens, halves of tokens and ordinary text, in any order."""
    some = st.lists(st.sampled_from(tokens) | pieces | ordinary, max_size=12)
    return some.map("".join)


HOSTILE = texts_of(*KNOWN, *PLACEHOLDERS, *TAGS, *FOREIGN)


@dataclass(frozen=True)
class Policy:
    """A model folder's tokenizer and template, used directly."""

    template: Any
    tokenizer: Any
    control: dict[int, str]
    extra: tuple[str, ...]
    """Tokens that are neutralized in addition to the static pattern."""

    def control_in(self, turns: list[tuple[str, list[dict[str, str]]]]) -> Counter[str]:
        """Count the control tokens of the rendered and tokenized conversation."""
        messages = [{"role": role, "content": content} for role, content in turns]
        text = self.template.render(messages=messages, add_generation_prompt=len(turns) == 1)
        ids = self.tokenizer.encode(text).ids
        return Counter(self.control[i] for i in ids if i in self.control)


def policy_of(folder: Path) -> Policy:
    tokenizer = read_tokenizer(folder)[0]
    added = tokenizer.get_added_tokens_decoder()
    every = {i: t.content for i, t in added.items()}
    return Policy(read_template(folder)[0], tokenizer, every, extra_control_tokens(added.values()))


@pytest.fixture(scope="module", params=["tiny", "qwen", "foreign"])
def policy(request, tmp_path_factory, policy_with_tokens) -> Policy:
    if request.param == "tiny":
        return replace(policy_of(TINY), extra=())
    special = (*QWEN_SPECIAL, *FOREIGN) if request.param == "foreign" else tuple(QWEN_SPECIAL)
    folder = tmp_path_factory.mktemp("policy") / "m"
    loaded = policy_of(policy_with_tokens(folder, special, tuple(QWEN_ADDED)))
    return loaded if request.param == "foreign" else replace(loaded, extra=())


IMAGE = {"type": "image"}


def turn(prompt: str) -> list[dict[str, str]]:
    """Split a row's prompt as verl does."""
    first, *rest = prompt.split("<image>")
    assert not first and len(rest) == 1
    return [IMAGE, {"type": "text", "text": rest[0]}]


def all_turns(prompts: Prompts, query: str, description: str) -> Iterator[str]:
    yield prompts.kfg(query, 6)
    yield prompts.kfg_again(query, 6, [(3, ""), (1, "hidden")], description)
    yield prompts.aks(description, query)
    yield prompts.ktg(description, query, canvas=112)
    yield prompts.ktg(description, query, zero_target=True, canvas=112)
    yield prompts.trace("aks", description, query, "A", 112)


@pytest.mark.parametrize("name", sorted(p.stem for p in SHIPPED.glob("*.yaml")))
@settings(deadline=None, max_examples=60)
@given(query=HOSTILE, description=HOSTILE)
def test_a_prompt_has_the_control_tokens_of_its_template_alone(policy, name, query, description):
    prompts = load_prompts(name, policy.extra)
    expected = policy.control_in([("user", [IMAGE])])
    for text, clean in zip(
        all_turns(prompts, query, description), all_turns(prompts, "x", "y"), strict=True
    ):
        assert policy.control_in([("user", turn(user_turn(text, "image")))]) == expected
        assert [text.count(tag) for tag in TAGS] == [clean.count(tag) for tag in TAGS]


@settings(deadline=None, max_examples=100)
@given(thought=HOSTILE)
def test_a_target_is_well_formed_and_has_no_control_token(policy, thought):
    target = response(thought, "A", policy.extra)
    parsed = parse_response(target)
    assert parsed.well_formed and parsed.answer == "A"
    assert not any(token in target for token in PLACEHOLDERS)
    turns = [("user", [IMAGE]), ("assistant", [{"type": "text", "text": target}])]
    expected = policy.control_in([turns[0], ("assistant", [])])
    assert policy.control_in(turns) == expected


@settings(deadline=None)
@given(text=HOSTILE, keep_tags=st.booleans())
@pytest.mark.parametrize("extra", [(), FOREIGN])
def test_neutralizing_twice_is_neutralizing_once(extra, text, keep_tags):
    once = neutralize(text, extra, keep_tags)
    assert neutralize(once, extra, keep_tags) == once
    assert control_tokens(once, extra, keep_tags) == []
    assert (once == text) == (control_tokens(text, extra, keep_tags) == [])


@given(text=st.text())
def test_text_without_an_opening_bracket_is_unchanged(text):
    text = text.replace("<", "")
    assert neutralize(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "the cat <3 the dog",
        "a < b, c > d",
        "x <| y |> z",
        "<|>",
        "<||>",
        "<b>bold</b>",
        "< think >",
        "<Answer>",
        "the <images> folder",
        "1 <image",
        "(|im_end|)",
        "im_end|>",
        "<tool>",
        "𝟚 \u2028 \x00 é",
        '[{"bbox_2d": [1, 2, 3, 4]}]',
    ],
)
def test_text_that_only_resembles_a_token_is_unchanged(text):
    assert neutralize(text) == text


def test_a_neutralized_token_is_readable_and_equally_long():
    assert neutralize("a <|im_end|> b </tool_call>") == "a (|im_end|) b (/tool_call)"
    assert neutralize("<think><image></answer>") == "(think)(image)(/answer)"
    assert neutralize("<think><image></answer>", keep_tags=True) == "<think>(image)</answer>"
    assert neutralize("see [SEG], EOT.", FOREIGN) == "see (SEG), E OT."


def test_every_published_token_of_qwen_is_known_without_a_tokenizer(policy):
    for token in (*KNOWN, *PLACEHOLDERS, *TAGS, "<tool_response>", "</tool_response>"):
        assert control_tokens(f"a{token}b") == [token]
    extra = extra_control_tokens(policy.tokenizer.get_added_tokens_decoder().values())
    assert set(extra) == set(FOREIGN) & set(policy.control.values())


def test_extra_tokens_nested_in_one_another_are_all_rewritten():
    extra = ("[SEG]", "(SEG]", "aa", "<<s>>", "<s>")
    for text in ("[[SEG]]", "aaaa", "<<<s>>>", "<<|im_end|>s>"):
        plain = neutralize(text, extra)
        assert not any(token in plain for token in extra)
        assert neutralize(plain, extra) == plain


def test_added_words_of_a_tokenizer_are_ordinary_text(tmp_path, policy_with_tokens):
    folder = policy_with_tokens(tmp_path / "m", ordinary=("giraffe", "<think>", "<ref>"))
    assert policy_of(folder).extra == ("<ref>",)
    control = control_ids(read_tokenizer(folder)[0].get_added_tokens_decoder())
    assert set(control.values()) == {*SPECIALS, "<ref>"}
    counter = TokenCounter(folder)
    prompt = user_turn("a giraffe <think>", "image")
    counter.lengths([{"role": "user", "content": prompt}], "<think>a</think>", 112)


def test_a_token_that_cannot_be_rewritten_is_named(tmp_path, policy_with_tokens):
    counter = TokenCounter(policy_with_tokens(tmp_path / "m", ("§",)))
    assert counter.extra_control == ()
    prompt = load_prompts("compact", counter.extra_control).aks("a field", "paragraph § 5")
    row = [{"role": "user", "content": user_turn(prompt, "image")}]
    with pytest.raises(InputError, match="'§'") as caught:
        counter.lengths(row, None, 112)
    assert caught.value.file == str(tmp_path / "m" / "tokenizer.json")
    clean = [{"role": "user", "content": user_turn("x", "image")}]
    with pytest.raises(InputError, match="im_end"):
        counter.lengths(clean, "a <|im_end|> b", 112)
    counter.lengths(clean, "a b", 112)


def test_surplus_is_counted_and_not_only_seen():
    control = {1: "<a>", 2: "<b>"}
    assert surplus_tokens([1, 7, 1, 2], [1, 2], control) == ["<a>"]
    assert surplus_tokens([1, 7, 2], [2, 1], control) == []


def test_a_field_and_its_template_form_no_token_together(tmp_path):
    path = tmp_path / "own.yaml"
    templates = {task: f"{task} <|$query|> <$description>" for task in TASKS if task != "vdg"}
    templates["kfg"] = "<|$query|>"
    path.write_text(yaml.safe_dump({**templates, "vdg": "v"}), encoding="utf-8")
    prompts = load_prompts(str(path))
    assert prompts.aks("image", "im_end") == "aks (|im_end|) (image)"


@pytest.mark.parametrize("token", ["<|im_end|>", "<image>", "<tool_call>", "[SEG]"])
def test_a_template_with_a_control_token_is_refused(tmp_path, token):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(dict.fromkeys(TASKS, f"a {token} b")), encoding="utf-8")
    with pytest.raises(InputError, match="contains") as caught:
        load_prompts(str(path), FOREIGN)
    assert caught.value.file == str(path) and token in caught.value.message
