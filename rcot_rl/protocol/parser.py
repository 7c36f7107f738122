"""Responses of the policy as typed values: one parser for rewards, traces and inference.

Implements the response structure of section 3.2 and equations 4 and 5 of the paper: reasoning
inside `<think></think>`, then the decision inside `<answer></answer>`.

Tags do not nest: reading from the left, a block runs from an opening tag to the next closing tag of
its kind, and tags inside it open nothing. An opening tag that is never closed starts no block.

Everything is linear in the length of the text, and no text raises. The bounds (`MAX_*`) are far
beyond any honest answer; text that exceeds one is malformed, and is never truncated.

Not implemented: repair of any kind (inference must not accept what training does not accept).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

MAX_CHARS = 1 << 22
"""Longest response that is parsed, in characters."""
MAX_BLOCKS = 4096
"""Maximum number of `<think>` and `<answer>` blocks in one response."""

ResponseForm = Literal["think_answer", "answer"]
"""What the policy writes: reasoning and then the answer, or only the answer (Table 15)."""

THINK, THINK_END = "<think>", "</think>"
ANSWER, ANSWER_END = "<answer>", "</answer>"
TAGS = (THINK, THINK_END, ANSWER, ANSWER_END)


class ParseFault(str):
    """A reason code with its position; equal to the plain code."""

    at: int
    """Structure: character index in the response. JSON: character index in the answer. Item: its
    index in the list."""

    __slots__ = ("at",)

    def __new__(cls, code: str, at: int = 0) -> ParseFault:
        fault = super().__new__(cls, code)
        fault.at = at
        return fault


class ParsedResponse(msgspec.Struct, frozen=True):
    """The structure of one response."""

    thought: str | None
    """Stripped content of the think block; None unless there is exactly one."""
    answer: str | None
    """Stripped content of the answer block outside any think block, also in a malformed response;
    None unless there is exactly one."""
    well_formed: bool
    """True for exactly `<think>…</think><answer>…</answer>`, ignoring white space around and
    between the blocks."""
    faults: tuple[ParseFault, ...]
    """Reason codes; empty if and only if well formed."""


def parse_response(text: str) -> ParsedResponse:
    """Split a response into thought and answer. Never raises on any str."""
    if len(text) > MAX_CHARS:
        return ParsedResponse(None, None, False, (ParseFault("response_too_long", MAX_CHARS),))
    body = text.strip()
    if body.startswith(THINK) and body.endswith(ANSWER_END):
        # fast path: the only "<" are those of the four tags, so no tag can be repeated
        think_end = body.find("<", len(THINK))
        answer = body.find("<", think_end + 1)
        start, end = answer + len(ANSWER), len(body) - len(ANSWER_END)
        if (
            body.find("<", start - 1) == end
            and body.startswith(THINK_END, think_end)
            and body.startswith(ANSWER, answer)
            and (answer == think_end + 8 or body[think_end + 8 : answer].isspace())
        ):
            thought = body[len(THINK) : think_end].strip()
            return ParsedResponse(thought, body[start:end].strip(), True, ())
        contents = _well_formed_contents(body)
        if contents is not None:
            return ParsedResponse(*contents, True, ())
    lead = len(text) - len(text.lstrip())
    blocks = _blocks(body)
    if blocks is None:
        return ParsedResponse(None, None, False, (ParseFault("too_many_blocks", lead),))
    thoughts, answers = blocks
    return ParsedResponse(
        thought=_content(body, thoughts),
        answer=_content(body, answers),
        well_formed=False,
        faults=tuple(
            ParseFault(code, lead + at) for code, at in _structure_faults(body, thoughts, answers)
        ),
    )


def answer_only_faults(text: str) -> tuple[ParseFault, ...]:
    """Return why a response is not exactly one `<answer>…</answer>`; empty if it is.

    This is the structure of a policy that writes no reasoning (Table 15). White space around the
    block is ignored; none of the four tags may occur again. Never raises on any str.
    """
    if len(text) > MAX_CHARS:
        return (ParseFault("response_too_long", MAX_CHARS),)
    body = text.strip()
    lead = len(text) - len(text.lstrip())
    starts, ends = body.startswith(ANSWER), body.endswith(ANSWER_END)
    if starts and ends and [body.count(tag) for tag in TAGS] == [0, 0, 1, 1]:
        return ()
    blocks = _blocks(body)
    if blocks is None:
        return (ParseFault("too_many_blocks", lead),)
    thoughts, answers = blocks
    thinks = [at for tag in (THINK, THINK_END) if (at := body.find(tag)) >= 0]
    faults = [("think_unexpected", min(thinks))] if thinks else []
    faults += _block_faults(body, ANSWER, "answer_inside_think", answers, thoughts)
    if not faults:
        again = _repeated_tags(body)
        at = body.find(ANSWER)
        end = body.find(ANSWER_END) + len(ANSWER_END)
        after = end + len(body[end:]) - len(body[end:].lstrip())
        outside = ("text_outside_tags", 0 if at > 0 else after)
        faults = [("stray_tag", min(again)) if again else outside]
    return tuple(ParseFault(code, lead + at) for code, at in faults)


def parse_option(answer: str | None, options: Sequence[str] = ("A", "B")) -> str | None:
    """Return the option that an AKS answer names (eq. 4); None unless it is one of `options`.

    Exact membership after stripping: no prefix, other case, substring or full stop.
    """
    if answer is None:
        return None
    answer = answer.strip()
    return answer if answer in tuple(options) else None


def parse_keyframe(answer: str | None, n_frames: int) -> int | None:
    """Return the 0-based frame index of a KFG answer (eq. 1); None without a valid one.

    Valid are bare ASCII digits with 0 <= index < n_frames. The caller decides what to do without
    an index, and records it.
    """
    if answer is None:
        return None
    answer = answer.strip()
    if not (0 < len(answer) <= 9 and answer.isascii() and answer.isdigit()):
        return None
    index = int(answer)
    return index if index < n_frames else None


def _well_formed_contents(body: str) -> tuple[str, str] | None:
    """Return the stripped thought and answer of a well-formed response; None for any other.

    Args:
        body: Text that starts with `<think>` and ends with `</answer>`.
    """
    think_end = body.find(THINK_END, len(THINK))
    answer = body.find(ANSWER, think_end + len(THINK_END))
    if think_end < 0 or answer < 0:
        return None
    between = body[think_end + len(THINK_END) : answer]
    if between and not between.isspace():
        return None
    if any(body.count(tag) != 1 for tag in TAGS):
        return None
    thought = body[len(THINK) : think_end].strip()
    return thought, body[answer + len(ANSWER) : -len(ANSWER_END)].strip()


Spans = list[tuple[int, int]]


def _blocks(body: str) -> tuple[Spans, Spans] | None:
    """Return the content spans of the think and of the answer blocks; None beyond MAX_BLOCKS.

    Linear: the position of the next opening tag of each kind is kept until it is passed, so no part
    of the text is searched twice for the same tag.
    """
    thoughts: Spans = []
    answers: Spans = []
    think, answer = body.find(THINK), body.find(ANSWER)
    while think >= 0 or answer >= 0:
        is_think = answer < 0 or 0 <= think < answer
        if is_think:
            start, closing, spans = think + len(THINK), THINK_END, thoughts
        else:
            start, closing, spans = answer + len(ANSWER), ANSWER_END, answers
        end = body.find(closing, start)
        if end < 0:  # no later block of this kind can be closed either
            think, answer = (-1, answer) if is_think else (think, -1)
            continue
        if len(thoughts) + len(answers) == MAX_BLOCKS:
            return None
        spans.append((start, end))
        end += len(closing)
        if 0 <= think < end:
            think = body.find(THINK, end)
        if 0 <= answer < end:
            answer = body.find(ANSWER, end)
    return thoughts, answers


def _content(body: str, spans: Spans) -> str | None:
    return body[slice(*spans[0])].strip() if len(spans) == 1 else None


def _structure_faults(body: str, thoughts: Spans, answers: Spans) -> list[tuple[str, int]]:
    """Return why a response is malformed and where; at least one code."""
    faults = _block_faults(body, THINK, "think_inside_answer", thoughts, answers)
    faults += _block_faults(body, ANSWER, "answer_inside_think", answers, thoughts)
    if faults:
        return faults
    again = _repeated_tags(body)
    if again:
        return [("stray_tag", min(again))]
    if body.find(ANSWER) < body.find(THINK):
        return [("answer_before_think", body.find(ANSWER))]
    return [("text_outside_tags", _outside(body))]


def _block_faults(
    body: str, tag: str, nested: str, spans: Spans, others: Spans
) -> list[tuple[str, int]]:
    """Return why a response does not have exactly one block of `tag`; empty if it has.

    Args:
        nested: Code for a block that only exists inside a block of the other kind.
        spans: Blocks of `tag`.
        others: Blocks of the other kind.
    """
    name = tag.strip("<>")
    if len(spans) > 1:
        return [(f"{name}_repeated", spans[1][0] - len(tag))]
    if spans:
        return []
    within = (body.find(tag, start, end) for start, end in others)
    swallowed = next((at for at in within if at >= 0), -1)
    opened = body.find(tag)
    if swallowed >= 0:
        return [(nested, swallowed)]
    return [(f"{name}_unclosed", opened) if opened >= 0 else (f"{name}_missing", 0)]


def _repeated_tags(body: str) -> list[int]:
    """Return where tags occur a second time."""
    return [at for tag in TAGS if (at := body.find(tag, body.find(tag) + 1)) >= 0]


def _outside(body: str) -> int:
    """Return where the first text outside one think and one answer block begins."""
    edges = ((0, body.find(THINK)), (body.find(THINK_END) + len(THINK_END), body.find(ANSWER)))
    for start, end in edges:
        left = body[start:end]
        if left.strip():
            return start + len(left) - len(left.lstrip())
    start = body.find(ANSWER_END) + len(ANSWER_END)
    return start + len(body[start:]) - len(body[start:].lstrip())
