"""`answer_format`: the format reward R_f of a policy that writes no reasoning (Table 15).

As `format`, but a response is well formed if it is exactly one `<answer>…</answer>`. Reasoning is
malformed here: otherwise GRPO could bring back what the ablation removes.
"""

from __future__ import annotations

from typing import Any

from rcot_rl.protocol.parser import answer_only_faults, parse_option
from reward_fns.components.format import item_format
from reward_fns.registry import NoParams, Response, Settings, Term, register


def maximum(params: NoParams, settings: Settings) -> float:
    """Return the greatest possible value: 3 for ktg, 1 for aks."""
    return 3.0 if settings.task == "ktg" else 1.0


@register("answer_format", params=NoParams, tasks=("aks", "ktg"), maximum=maximum)
def answer_format(response: Response, truth: Any, params: NoParams, settings: Settings) -> Term:
    """Return R_f of a response without reasoning; the ground truth is not read."""
    reasons: list[str] = list(answer_only_faults(response.text))
    structure = 0.0 if reasons else 1.0
    if settings.task == "ktg":
        items = item_format(response, settings.zero_target)
        return Term(structure + items.value, reasons + items.reasons)
    answer = response.parsed.answer
    if parse_option(answer, settings.options) is None:
        return Term(0.0, [*reasons, "answer_missing" if answer is None else "option_unknown"])
    return Term(structure, reasons)
