"""Control tokens in other people's text, rewritten as plain text.

A tokenizer reads `<|im_end|>` in an expression as the end of the turn, verl splits messages at
`<image>`, and the parser looks for `<think>`. Expressions, descriptions, traces and responses may
hold any of these. `neutralize` turns their brackets into parentheses, `<|im_end|>` into
`(|im_end|)`: as long as before, still readable, and no token any more. Text without such tokens
stays as it is, byte for byte.

The pattern knows every published `<|name|>`, Qwen's `<tool_call>` and `<tool_response>`, verl's
placeholders and the protocol's own tags. A tokenizer may have other control tokens: `own_tokens`
finds them, and they are passed as `own`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

_CONTROL = r"<\|[\w.:/-]{1,64}\|>|</?tool_(?:call|response)>|<(?:image|video|audio)>"
_TAGS = r"</?(?:think|answer)>"
_BRACKETS = {"<": ">", "[": "]", "{": "}"}


def neutralize(text: str, own: tuple[str, ...] = (), keep_tags: bool = False) -> str:
    """Return `text` without control tokens; idempotent, and the identity on text without any.

    own: further tokens of the policy's tokenizer, from `own_tokens`. keep_tags: leave `<think>`
    and `<answer>` alone, in a text whose structure they are (a whole prompt or response).
    """
    pattern = _pattern(own, keep_tags)
    while (plain := pattern.sub(_plain, text)) != text:
        text = plain  # again: one token may have been hidden inside another
    return text


def control_tokens(text: str, own: tuple[str, ...] = (), keep_tags: bool = False) -> list[str]:
    """Return the distinct tokens that `neutralize` would rewrite, in the order of the text."""
    return list(dict.fromkeys(_pattern(own, keep_tags).findall(text)))


def own_tokens(added: Iterable[Any]) -> tuple[str, ...]:
    """Return a tokenizer's control tokens that the static pattern does not know.

    added: its `AddedToken`s. A token of one character, or one with white space and no brackets,
    cannot be rewritten and is left out; `surplus_tokens` reports a prompt that holds it.
    """
    known = _pattern((), False)
    found = {token.content for token in added if _is_control(token)}
    return tuple(
        sorted(
            (t for t in found if not known.fullmatch(t) and len(t) > 1 and _can_be_split(t)),
            key=lambda token: (-len(token), token),
        )
    )


def control_ids(added: Mapping[int, Any]) -> dict[int, str]:
    """Return id -> text of a tokenizer's control tokens, its `AddedToken`s by id given.

    The protocol's own tags are not among them, though some tokenizers have them as tokens.
    """
    tags = re.compile(_TAGS)
    return {
        number: token.content
        for number, token in added.items()
        if _is_control(token) and not tags.fullmatch(token.content)
    }


def surplus_tokens(
    ids: Iterable[int], template: Iterable[int], control: Mapping[int, str]
) -> list[str]:
    """Return the control tokens of `ids` beyond those of `template`, the prompt without its text.

    control: as `control_ids` returns it.
    """
    extra = Counter(i for i in ids if i in control) - Counter(i for i in template if i in control)
    return [control[i] for i in extra]


@lru_cache(maxsize=64)
def _pattern(own: tuple[str, ...], keep_tags: bool) -> re.Pattern[str]:
    parts = [*map(re.escape, own), _CONTROL, *([] if keep_tags else [_TAGS])]
    return re.compile("|".join(parts))


def _plain(match: re.Match[str]) -> str:
    token = match[0]
    if _BRACKETS.get(token[0]) == token[-1]:
        return f"({token[1:-1]})"
    return f"{token[0]} {token[1:]}"


def _is_control(token: Any) -> bool:
    """Return True for a special token, and for an added one that looks like markup."""
    text = token.content
    return bool(token.special or (len(text) > 2 and _BRACKETS.get(text[0]) == text[-1]))


def _can_be_split(token: str) -> bool:
    """Return True if rewriting ends: each pass takes a bracket away, or parts two characters."""
    return _BRACKETS.get(token[0]) == token[-1] or not any(map(str.isspace, token))
