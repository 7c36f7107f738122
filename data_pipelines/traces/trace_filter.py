"""Accept a trace for SFT only if its answer is right and its reasoning usable (paper, 3.4).

A trace can be refused for several causes; each is counted:

    malformed      not exactly <think>…</think><answer>…</answer>
    wrong_option   AKS: another option than the annotation's
    wrong_count    KTG: another number of objects
    inaccurate     KTG: boxes or points that the reward's matcher does not credit
    leak           the reasoning reveals that the annotation was given
    short, long    the reasoning is outside `min_words` and `max_words`
    repeated       the reasoning repeats itself
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rcot_rl.protocol.grounding import parse_grounding
from rcot_rl.protocol.parser import parse_option, parse_response
from rcot_rl.recipe.data_section import TracerSection
from reward_fns.components.reasoning import NonRepeat, ReasoningLength, non_repeat, reasoning_length
from reward_fns.registry import Response, Settings
from reward_fns.score import Reward, load_reward

Cause = Literal[
    "malformed",
    "wrong_option",
    "wrong_count",
    "inaccurate",
    "leak",
    "short",
    "long",
    "repeated",
]

_LEAK = re.compile(
    r"\b(?:"
    r"annotat(?:ion|ions|ed)|ground[ -]?truth|bounding box(?:es)? (?:is|are|was|were) (?:given|"
    r"provided)|(?:given|provided|supplied|known|stated|listed) (?:box|boxes|bounding|coordinates?|"
    r"points?|answers?|options?|locations?|hints?|targets?|labels?)|(?:as|was|were|is|are) "
    r"(?:given|told|provided|stated) (?:to me|in the prompt|in the question|above|beforehand)|"
    r"(?:the )?(?:right|correct) (?:option|answer) (?:is|was) (?:given|known|provided|stated)|"
    r"i (?:was|am|have been) (?:told|given)|according to the (?:prompt|boxes|coordinates|hint|"
    r"answer|label)|you (?:gave|told|said|provided)|hint(?:ed|s)?"
    r")\b",
    re.IGNORECASE,
)
"""Phrases that only a model with the annotation in its prompt has a reason to write. No nested
repetition: linear in the text's length."""

_NUMBERS = re.compile(r"\d{1,5}")


@dataclass(frozen=True)
class TraceVerdict:
    """The filter's verdict on one response."""

    causes: tuple[Cause, ...]
    """Why it is refused; empty if accepted."""

    @property
    def accepted(self) -> bool:
        """True if the response is kept."""
        return not self.causes


class TraceFilter:
    """The trace filter of one recipe.

    Args:
        section: The recipe's `data.tracer`.
        canvas: Side of the canvas in pixels, for the reward's thresholds.
    """

    def __init__(self, section: TracerSection, canvas: int) -> None:
        self.section = section
        # some annotations have no object: then [] is the correct answer
        self._ktg: Reward = load_reward("ktg-zero-target", canvas=canvas)
        self._settings = Settings(task="aks")  # required by the two terms below, but not used
        # of the reward's soft bounds only the inner ones refuse
        most = max(section.max_words, section.min_words)
        self._length = ReasoningLength(least=section.min_words, most=most, end=most + 1)
        self._repeat = NonRepeat(allowed=section.max_repeated)

    def verdict(
        self, task: str, response: str, truth: str | Sequence[Mapping[str, Any]]
    ) -> TraceVerdict:
        """Judge one response.

        Args:
            task: `aks` or `ktg`.
            truth: The row's ground truth: the option, or boxes and points in canvas pixels.
        """
        parsed = parse_response(response)
        if not parsed.well_formed:
            return TraceVerdict(("malformed",))
        causes = self.check_answer(task, response, truth)
        thought = parsed.thought or ""
        if self._leaks(thought, truth):
            causes.append("leak")
        scored = Response(response)
        for code in reasoning_length(scored, None, self._length, self._settings).reasons:
            causes.append("long" if code == "thought_long" else "short")
        if non_repeat(scored, None, self._repeat, self._settings).reasons:
            causes.append("repeated")
        return TraceVerdict(tuple(causes))

    def check_answer(self, task: str, response: str, truth: Any) -> list[Cause]:
        """Return why the answer alone is refused; arguments as `verdict`."""
        parsed = parse_response(response)
        if task == "aks":
            return [] if parse_option(parsed.answer) == truth else ["wrong_option"]
        score = self._ktg.score(response, list(truth))
        perfect = self._ktg.score(_perfect_response(truth), list(truth)).components
        if score.components["format"] < perfect["format"]:
            return ["malformed"]
        if parse_grounding(parsed.answer).n_items != len(truth):
            return ["wrong_count"]
        accurate = score.components["accuracy"] >= self.section.min_accuracy * perfect["accuracy"]
        return [] if accurate else ["inaccurate"]

    def _leaks(self, thought: str, truth: Any) -> bool:
        if _LEAK.search(thought):
            return True
        if not self.section.forbid_coordinates or isinstance(truth, str):
            return False
        numbers = [int(n) for n in _NUMBERS.findall(thought)]
        return any(_recites(list(item["bbox_2d"]), numbers) for item in truth)


def _perfect_response(truth: Any) -> str:
    return f"<think>.</think><answer>{json.dumps(list(truth))}</answer>"


def _recites(box: list[int], numbers: list[int]) -> bool:
    """Return True if the box's four coordinates occur one after the other."""
    return any(numbers[i : i + 4] == box for i in range(len(numbers) - 3))
