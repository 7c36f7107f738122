"""Control tokens in foreign text, rewritten as plain text.

A tokenizer reads `<|im_end|>` in an expression as the end of the turn, verl splits messages at
`<image>`, and the parser looks for `<think>`. Expressions, descriptions, traces and responses may
contain any of these. `neutralize` turns their brackets into parentheses: `<|im_end|>` becomes
`(|im_end|)`, which has the same length, is readable, and is not a token. Text without control
tokens is returned unchanged, byte for byte.

The static pattern covers every published `<|name|>`, Qwen's `<tool_call>` and `<tool_response>`,
verl's placeholders and the protocol's own tags. A tokenizer may have further control tokens:
`extra_control_tokens` returns them, and callers pass them as `extra`.
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


def neutralize(text: str, extra: tuple[str, ...] = (), keep_tags: bool = False) -> str:
    """Return `text` without control tokens. Idempotent.

    Args:
        extra: Further tokens of the policy's tokenizer, from `extra_control_tokens`.
        keep_tags: Keep `<think>` and `<answer>`, for text that they structure (a whole prompt or
            response).
    """
    pattern = _pattern(extra, keep_tags)
    while (plain := pattern.sub(_plain, text)) != text:
        text = plain  # rewriting one token may uncover another
    return text


def control_tokens(text: str, extra: tuple[str, ...] = (), keep_tags: bool = False) -> list[str]:
    """Return the distinct tokens that `neutralize` would rewrite, in text order."""
    return list(dict.fromkeys(_pattern(extra, keep_tags).findall(text)))


def extra_control_tokens(added: Iterable[Any]) -> tuple[str, ...]:
    """Return a tokenizer's control tokens that the static pattern does not cover.

    Tokens of one character, and tokens with white space and no brackets, cannot be rewritten and
    are omitted; `surplus_tokens` reports a prompt that contains one.
    """
    known = _pattern((), False)
    control = {token.content for token in added if _is_control(token)}
    return tuple(
        sorted(
            (t for t in control if not known.fullmatch(t) and len(t) > 1 and _can_be_split(t)),
            key=lambda token: (-len(token), token),
        )
    )


def control_ids(added: Mapping[int, Any]) -> dict[int, str]:
    """Return id -> text of a tokenizer's control tokens, without the protocol's own tags."""
    tags = re.compile(_TAGS)
    return {
        token_id: token.content
        for token_id, token in added.items()
        if _is_control(token) and not tags.fullmatch(token.content)
    }


def surplus_tokens(
    ids: Iterable[int], template: Iterable[int], control: Mapping[int, str]
) -> list[str]:
    """Return the control tokens of a prompt beyond those of its chat template."""
    surplus = Counter(i for i in ids if i in control) - Counter(i for i in template if i in control)
    return [control[i] for i in surplus]


@lru_cache(maxsize=64)
def _pattern(extra: tuple[str, ...], keep_tags: bool) -> re.Pattern[str]:
    parts = [*map(re.escape, extra), _CONTROL, *([] if keep_tags else [_TAGS])]
    return re.compile("|".join(parts))


def _plain(match: re.Match[str]) -> str:
    token = match[0]
    if _BRACKETS.get(token[0]) == token[-1]:
        return f"({token[1:-1]})"
    return f"{token[0]} {token[1:]}"


def _is_control(token: Any) -> bool:
    """Return True for a special token, and for an added token that looks like markup."""
    text = token.content
    return bool(token.special or (len(text) > 2 and _BRACKETS.get(text[0]) == text[-1]))


def _can_be_split(token: str) -> bool:
    """Return True if rewriting terminates: each pass removes a bracket or splits two characters."""
    return _BRACKETS.get(token[0]) == token[-1] or not any(map(str.isspace, token))
