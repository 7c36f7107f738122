"""Rewards for the reasoning text: `non_repeat` and `reasoning_length`.

They read only the content of the think block, so that repetitions in the answer (keys, brackets)
cost nothing. Both take time linear in its length. They do not judge what the reasoning says.
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
    """Number of words in an n-gram."""
    allowed: Share = 0.2
    """Share of repeated n-grams that costs nothing; a larger share costs in proportion."""


@register("non_repeat", params=NonRepeat, tasks=TASKS, maximum=1.0)
def non_repeat(response: Response, truth: Any, params: NonRepeat, settings: Settings) -> Term:
    """Return 1 for reasoning without repetition, falling linearly to 0.

    Words and numbers are tokens (`12.5` is one), punctuation is ignored: repetition counts without
    full stops too, and decimal points are not taken for full stops.
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
    """`characters` suits languages without spaces between words."""
    least: Annotated[int, Field(ge=0)] = 20
    """Minimum length for the full value."""
    most: Annotated[int, Field(ge=1)] = 400
    """Maximum length for the full value."""
    end: Annotated[int, Field(ge=1)] = 800
    """Length at which the value has fallen to 0."""
    empty: Share = 0.0
    """Value of an empty think block; it rises linearly to 1 at `least`."""

    @model_validator(mode="after")
    def _ordered(self) -> ReasoningLength:
        if not self.least <= self.most < self.end:
            raise ValueError("must satisfy least <= most < end")
        return self


@register("reasoning_length", params=ReasoningLength, tasks=TASKS, maximum=1.0)
def reasoning_length(
    response: Response, truth: Any, params: ReasoningLength, settings: Settings
) -> Term:
    """Return 1 between `least` and `most`, linear outside."""
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
