"""Is a trace fit to learn from? (paper, 3.4: kept only when its answer is right)

A trace is refused for every cause that applies, and each refusal is counted by cause:

    malformed                 not exactly <think>…</think><answer>…</answer>
    wrong_option              AKS: the option is not the annotation's
    wrong_count, inaccurate   KTG: another number of objects; boxes or points that the reward's own
                              matcher does not credit
    leak                      the reasoning says, or shows, that the annotation was given
    short, long, repeated     bounds on the reasoning
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcot_rl.protocol.grounding import parse_grounding
from rcot_rl.protocol.parser import parse_option, parse_response
from rcot_rl.recipe.data import TracerSection
from reward_fns.components.reasoning import NonRepeat, ReasoningLength, non_repeat, reasoning_length
from reward_fns.registry import Response, Settings
from reward_fns.score import Reward, load_reward

CAUSES = (
    "malformed", "wrong_option", "wrong_count", "inaccurate", "leak", "short", "long", "repeated",
)  # fmt: skip

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
"""What somebody who found the answer by looking has no reason to say. No nested repetition: linear
in the text's length."""

_NUMBERS = re.compile(r"\d{1,5}")


@dataclass(frozen=True)
class Verdict:
    """What became of one response."""

    causes: tuple[str, ...]
    """Of `CAUSES`; empty: accepted."""

    @property
    def accepted(self) -> bool:
        return not self.causes


class Acceptance:
    """The filters of one recipe. `canvas`: side of the image, for the reward's thresholds."""

    def __init__(self, section: TracerSection, canvas: int) -> None:
        self.section = section
        # an annotation may hold no object: then [] is the right answer
        self._ktg: Reward = load_reward("ktg-zero-target", canvas=canvas)
        self._settings = Settings(task="aks")  # of which the two modules below use nothing
        # the reward's soft bounds, of which only the inner ones refuse
        most = max(section.max_words, section.min_words)
        self._length = ReasoningLength(least=section.min_words, most=most, end=most + 1)
        self._repeat = NonRepeat(allowed=section.max_repeated)

    def verdict(
        self, task: str, response: str, truth: str | Sequence[Mapping[str, Any]]
    ) -> Verdict:
        """task: aks or ktg; truth: the option, or boxes and points on the canvas (the row's)."""
        parsed = parse_response(response)
        if not parsed.well_formed:
            return Verdict(("malformed",))
        causes = self.answer(task, response, truth)
        thought = parsed.thought or ""
        if self._leaks(thought, truth):
            causes.append("leak")
        told = Response(response)
        for code in reasoning_length(told, None, self._length, self._settings).reasons:
            causes.append("long" if code == "thought_long" else "short")
        if non_repeat(told, None, self._repeat, self._settings).reasons:
            causes.append("repeated")
        return Verdict(tuple(causes))

    def answer(self, task: str, response: str, truth: Any) -> list[str]:
        """Causes against the answer alone; arguments as `verdict`."""
        parsed = parse_response(response)
        if task == "aks":
            return [] if parse_option(parsed.answer) == truth else ["wrong_option"]
        score = self._ktg.score(response, list(truth))
        best = self._ktg.score(_answered(truth), list(truth)).components
        if score.components["format"] < best["format"]:
            return ["malformed"]
        if parse_grounding(parsed.answer).n_items != len(truth):
            return ["wrong_count"]
        enough = score.components["accuracy"] >= self.section.min_accuracy * best["accuracy"]
        return [] if enough else ["inaccurate"]

    def _leaks(self, thought: str, truth: Any) -> bool:
        if _LEAK.search(thought):
            return True
        if not self.section.forbid_coordinates or isinstance(truth, str):
            return False
        numbers = [int(n) for n in _NUMBERS.findall(thought)]
        return any(_recited(list(item["bbox_2d"]), numbers) for item in truth)


def _answered(truth: Any) -> str:
    return f"<think>.</think><answer>{json.dumps(list(truth))}</answer>"


def _recited(box: list[int], numbers: list[int]) -> bool:
    """Whether the four coordinates of a box are said one after the other."""
    return any(numbers[i : i + 4] == box for i in range(len(numbers) - 3))
