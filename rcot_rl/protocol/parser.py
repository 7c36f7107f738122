"""Answers: what the policy said, as typed values. One parser for rewards, traces and inference.

Implements the structure that section 3.2 and equations 4 and 5 of the paper ask of a response:
reasoning inside `<think></think>`, then the decision inside `<answer></answer>`.

Blocks. Tags do not nest: reading from the left, a block runs from an opening tag to the next
closing tag of its kind, and what lies inside it opens nothing. An opening tag that is never closed
starts no block.

Everything here is linear in the length of the text, and no text raises. The bounds (`MAX_*`) are
far from any honest answer; text beyond one counts as malformed, never as shorter than it is.

Left out: repair of any kind (what is not accepted in training must not be accepted at inference).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

MAX_CHARS = 1 << 22
"""Longest response that is read, in characters."""
MAX_BLOCKS = 4096
"""Most `<think>` and `<answer>` blocks that are told apart in one response."""

THINK, THINK_END = "<think>", "</think>"
ANSWER, ANSWER_END = "<answer>", "</answer>"
TAGS = (THINK, THINK_END, ANSWER, ANSWER_END)


class Fault(str):
    """A reason code that knows its place; equal to the plain code."""

    at: int
    """A structure's: the character of the response. Of JSON: the character of the answer. An
    item's: its number in the list."""

    __slots__ = ("at",)

    def __new__(cls, code: str, at: int = 0) -> Fault:
        fault = super().__new__(cls, code)
        fault.at = at
        return fault


class ParsedResponse(msgspec.Struct, frozen=True):
    """The structure of one response."""

    thought: str | None
    """Stripped content of the only think block; None without exactly one."""
    answer: str | None
    """Stripped content of the only answer block outside any think block, well formed or not; None
    without exactly one."""
    well_formed: bool
    """Exactly `<think>…</think><answer>…</answer>`, white space around and between aside."""
    faults: tuple[Fault, ...]
    """Reason codes; empty exactly when well formed."""


def parse_response(text: str) -> ParsedResponse:
    """Split a response into thought and answer. Never raises on any str."""
    if len(text) > MAX_CHARS:
        return ParsedResponse(None, None, False, (Fault("response_too_long", MAX_CHARS),))
    body = text.strip()
    if body.startswith(THINK) and body.endswith(ANSWER_END):
        # the usual case: no "<" but those of the four tags, so none can stand a second time
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
        frame = _frame(body)
        if frame is not None:
            return ParsedResponse(*frame, True, ())
    lead = len(text) - len(text.lstrip())
    blocks = _blocks(body)
    if blocks is None:
        return ParsedResponse(None, None, False, (Fault("too_many_blocks", lead),))
    thoughts, answers = blocks
    return ParsedResponse(
        thought=_content(body, thoughts),
        answer=_content(body, answers),
        well_formed=False,
        faults=tuple(
            Fault(code, lead + at) for code, at in _structure_faults(body, thoughts, answers)
        ),
    )


def parse_option(answer: str | None, options: Sequence[str] = ("A", "B")) -> str | None:
    """The option that an AKS answer names (eq. 4): exactly one of `options`, or None.

    Exact membership after stripping: no prefix, no other case, no substring, no full stop.
    """
    if answer is None:
        return None
    answer = answer.strip()
    return answer if answer in tuple(options) else None


def parse_keyframe(answer: str | None, n_frames: int) -> int | None:
    """The 0-based frame index of a KFG answer (eq. 1), or None.

    Bare ASCII digits, 0 <= index < n_frames; anything else is no answer. What to do without one is
    the caller's decision, in the open.
    """
    if answer is None:
        return None
    answer = answer.strip()
    if not (0 < len(answer) <= 9 and answer.isascii() and answer.isdigit()):
        return None
    index = int(answer)
    return index if index < n_frames else None


def _frame(body: str) -> tuple[str, str] | None:
    """Thought and answer of a well-formed response, stripped; None for any other.

    body: what begins with a think tag and ends with an answer's.
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
    """Contents' (start, end) of the think blocks and of the answer blocks; None beyond MAX_BLOCKS.

    Linear: the place of the next opening tag of each kind is kept until it is passed, so no stretch
    of text is searched twice for the same tag.
    """
    thoughts: Spans = []
    answers: Spans = []
    think, answer = body.find(THINK), body.find(ANSWER)
    while think >= 0 or answer >= 0:
        is_think = answer < 0 or 0 <= think < answer
        if is_think:
            start, closing, found = think + len(THINK), THINK_END, thoughts
        else:
            start, closing, found = answer + len(ANSWER), ANSWER_END, answers
        end = body.find(closing, start)
        if end < 0:  # nor can any later block of this kind be closed
            think, answer = (-1, answer) if is_think else (think, -1)
            continue
        if len(thoughts) + len(answers) == MAX_BLOCKS:
            return None
        found.append((start, end))
        end += len(closing)
        if 0 <= think < end:
            think = body.find(THINK, end)
        if 0 <= answer < end:
            answer = body.find(ANSWER, end)
    return thoughts, answers


def _content(body: str, spans: Spans) -> str | None:
    return body[slice(*spans[0])].strip() if len(spans) == 1 else None


def _structure_faults(body: str, thoughts: Spans, answers: Spans) -> list[tuple[str, int]]:
    """Why a response is not well formed, and where: at least one code."""
    faults = []
    for tag, other, spans, inside in (
        (THINK, "think_inside_answer", thoughts, answers),
        (ANSWER, "answer_inside_think", answers, thoughts),
    ):
        name = tag.strip("<>")
        if len(spans) > 1:
            faults.append((f"{name}_repeated", spans[1][0] - len(tag)))
        elif not spans:
            within = (body.find(tag, start, end) for start, end in inside)
            swallowed = next((at for at in within if at >= 0), -1)
            opened = body.find(tag)
            if swallowed >= 0:
                faults.append((other, swallowed))
            elif opened >= 0:
                faults.append((f"{name}_unclosed", opened))
            else:
                faults.append((f"{name}_missing", 0))
    if faults:
        return faults
    again = [at for tag in TAGS if (at := body.find(tag, body.find(tag) + 1)) >= 0]
    if again:
        return [("stray_tag", min(again))]
    if body.find(ANSWER) < body.find(THINK):
        return [("answer_before_think", body.find(ANSWER))]
    return [("text_outside_tags", _outside(body))]


def _outside(body: str) -> int:
    """Where the first text outside one think and one answer block begins."""
    edges = ((0, body.find(THINK)), (body.find(THINK_END) + len(THINK_END), body.find(ANSWER)))
    for start, end in edges:
        left = body[start:end]
        if left.strip():
            return start + len(left) - len(left.lstrip())
    start = body.find(ANSWER_END) + len(ANSWER_END)
    return start + len(body[start:]) - len(body[start:].lstrip())
