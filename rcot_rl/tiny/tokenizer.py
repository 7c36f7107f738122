"""The tiny policy's tokenizer: a closed word list with byte fallback and Qwen's special tokens.

Nothing is learned. One regular expression splits a text; a piece in the word list is one token,
any other piece becomes its bytes, so every text round-trips. The pieces that the policy reads and
writes most (numbers, JSON glue, tags, shape words) are one token each, so that a model of a million
parameters can write boxes.

Left out: merges. An unknown word costs one token per byte.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
SPECIALS = (
    END_OF_TEXT,
    "<|im_start|>",
    END_OF_TURN,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2.5-VL's names, so that processors, vLLM and verl find their placeholders."""

MAX_NUMBER = 112
"""Every integer from 0 to this one is a token: pixels of the canvas and frame indices.

So is each with the comma and space that follow it in a list of numbers.
"""

GLUE = (
    "<think>",
    "</think>",
    "</think>\n",
    "<answer>",
    "</answer>",
    '[{"bbox_2d": [',
    '], "point_2d": [',
    ']}, {"bbox_2d": [',
    "]}]",
    " at [",
    "],",
    "].",
)
"""Tags and JSON pieces, one token each."""

_STARTERS = (
    "A B Describe Give How Is List No Point Query Scene Seen Show Target Think Video When Where "
    "Which Yes all assistant both first no system the user yes "
)
STARTERS = tuple(_STARTERS.split())
"""Words at the start of a line, without a space before them."""

_WORDS = (
    "A B Target Think a above after again all an and answer anything appear appears are at before "
    "below best big biggest black blue both bottom bounding box boxes brown center circle circles "
    "color coloured colours cross crosses cyan describe diamond diamonds disappear disappears "
    "down each enter enters first for fourth frame frames from give gray green grey here hidden in "
    "is it last largest later least leave leaves left line lowest magenta many most motion move "
    "moves moving never no not object objects of on one ones only or orange other others outside "
    "pentagon pink point points present purple query rectangle red return returns right ring "
    "rings round scene second seen shape shapes shown small smallest square squares stand star "
    "stars stay stays still target targets than that the them then there these they thing things "
    "think third this to top triangle triangles up valid video visible when where which while "
    "white whole with yellow yes "
)
WORDS = tuple(_WORDS.split())
"""Words inside a line, with a space before them."""

_SPLIT = "|".join(
    (
        r"</think>\n?|</?(?:think|answer)>",
        r'\[\{"bbox_2d": \[|\], "point_2d": \[|\]\}, \{"bbox_2d": \[|\]\}\]| at \[|\][,.]',
        r"\d{1,3}(?:, (?=\d))?",
        r" ?[A-Za-z]+",
        r'[^\sA-Za-z\d<\[\]{}"]+',
        r'[<\[\]{}"]',
        r"\s",
    )
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's turns, without its default system message."""


def in_list(number: int) -> str:
    """Return the token of a number that another one follows."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level.pre_tokenize_str(f"{number}, ")[0][0]


def vocabulary() -> dict[str, int]:
    """Return token (in the byte-level alphabet) -> id: specials, bytes, numbers, glue, words."""
    numbers = [str(n) for n in range(MAX_NUMBER + 1)]
    pieces = [*numbers, *(f"{n}, " for n in numbers)]
    pieces += [*GLUE, *STARTERS, *(f" {word}" for word in WORDS)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [byte_level.pre_tokenize_str(piece)[0][0] for piece in pieces]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer with its chat template, ready for `save_pretrained`."""
    backend = Tokenizer(models.BPE(vocab=vocabulary(), merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIALS[1:]),
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
