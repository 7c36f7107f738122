"""`option_accuracy`: the answer accuracy reward R_a of AKS (eq. 4): 1 or 0.

The answer counts if the response has exactly one; malformed structure costs only `format`.
"""

from __future__ import annotations

from rcot_rl.protocol.parser import parse_option
from reward_fns.registry import NoParams, Response, Settings, Term, register


@register("option_accuracy", params=NoParams, tasks=("aks",), maximum=1.0)
def option_accuracy(response: Response, truth: str, params: NoParams, settings: Settings) -> Term:
    """Return 1 if the answer is the option of the ground truth, else 0."""
    answer = response.parsed.answer
    if answer is None:
        return Term(0.0, ["answer_missing"])
    option = parse_option(answer, settings.options)
    if option is None:
        return Term(0.0, ["option_unknown"])
    return Term(1.0) if option == truth else Term(0.0, ["option_wrong"])
