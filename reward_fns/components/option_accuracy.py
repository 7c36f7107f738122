"""`option_accuracy`: the answer accuracy reward R_a of AKS (eq. 4): 1 or 0.

The answer counts wherever the structure leaves exactly one; malformed responses pay in `format`.
"""

from __future__ import annotations

from rcot_rl.protocol.parser import parse_option
from rcot_rl.recipe.base import Section
from reward_fns.registry import Response, Settings, Term, register


class OptionAccuracy(Section):
    """Parameters of `option_accuracy`: none."""


def maximum(params: OptionAccuracy, settings: Settings) -> float:
    """The greatest value."""
    return 1.0


@register("option_accuracy", params=OptionAccuracy, tasks=("aks",), maximum=maximum)
def option_accuracy(
    response: Response, truth: str, params: OptionAccuracy, settings: Settings
) -> Term:
    """1 when the answer is the ground truth's option, else 0."""
    answer = response.parsed.answer
    if answer is None:
        return Term(0.0, ["answer_missing"])
    option = parse_option(answer, settings.options)
    if option is None:
        return Term(0.0, ["option_unknown"])
    return Term(1.0) if option == truth else Term(0.0, ["option_wrong"])
