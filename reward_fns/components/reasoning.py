"""Rewards of the reasoning itself: `non_repeat` and `reasoning_length`.

They look at the content of the only think block and at nothing else, so that an answer's own
repetitions (keys, brackets) cost nothing. Both are linear in its length.

Left out: what the reasoning says.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rcot_rl.recipe.base import Section
from reward_fns.registry import Response, Settings, Term, register

TASKS = ("aks", "ktg", "kfg", "veason")
Share = Annotated[float, Field(ge=0, le=1)]
_WORD = re.compile(r"[^\W\d_]+|[0-9]+(?:[.,][0-9]+)*")


class NonRepeat(Section):
    """Parameters of `non_repeat`."""

    n: Annotated[int, Field(ge=1, le=64)] = 6
    """Words of an n-gram."""
    allowed: Share = 0.2
    """Share of n-grams that may have been there before; what is more costs in proportion."""


def _one(params: Section, settings: Settings) -> float:
    return 1.0


@register("non_repeat", params=NonRepeat, tasks=TASKS, maximum=_one)
def non_repeat(response: Response, truth: Any, params: NonRepeat, settings: Settings) -> Term:
    """1 for reasoning that does not repeat itself, falling to 0 where every n-gram is an old one.

    Words and whole numbers are counted (`12.5` is one), punctuation is not: repeating without full
    stops is repeating, and decimals are not.
    """
    thought = response.parsed.thought
    if thought is None:
        return Term(0.0, ["thought_missing"])
    words = _WORD.findall(thought.lower())
    total = len(words) - params.n + 1
    if total <= 1:
        return Term(1.0)
    distinct = len({tuple(words[i : i + params.n]) for i in range(total)})
    repeated = 1.0 - distinct / total
    if repeated <= params.allowed:
        return Term(1.0)
    return Term((1.0 - repeated) / (1.0 - params.allowed), ["repeated"])


class ReasoningLength(Section):
    """Parameters of `reasoning_length`."""

    unit: Literal["words", "characters"] = "words"
    """`characters` for languages that are written without spaces."""
    least: Annotated[int, Field(ge=0)] = 20
    """From here on reasoning is long enough."""
    most: Annotated[int, Field(ge=1)] = 400
    """Up to here it is not too long."""
    end: Annotated[int, Field(ge=1)] = 800
    """Here the reward for too long reasoning has fallen to 0."""
    empty: Share = 0.0
    """What an empty think block is worth; rises from there to 1 at `least`."""

    @model_validator(mode="after")
    def _ordered(self) -> ReasoningLength:
        if not self.least <= self.most < self.end:
            raise ValueError("needs least <= most < end")
        return self


@register("reasoning_length", params=ReasoningLength, tasks=TASKS, maximum=_one)
def reasoning_length(
    response: Response, truth: Any, params: ReasoningLength, settings: Settings
) -> Term:
    """1 between the soft bounds, linear outside them."""
    thought = response.parsed.thought
    if thought is None:
        return Term(0.0, ["thought_missing"])
    count = len(thought) if params.unit == "characters" else len(_WORD.findall(thought))
    if count < params.least:
        value = params.empty + (1.0 - params.empty) * count / params.least
        return Term(value, ["thought_short" if count else "thought_empty"])
    if count > params.most:
        value = max(0.0, (params.end - count) / (params.end - params.most))
        return Term(value, ["thought_long"])
    return Term(1.0)
