"""`rcot score probe`: what known exploits earn under a reward, compared with honest attempts.

An exploit pays if it earns at least as much as the best honest attempt that is not perfect: a
policy that finds it has no incentive to look at the image. The rows are built in: one object, three
objects, no object, and both options. Only `aks` and `ktg` have built-in rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rcot_rl.errors import InputError
from reward_fns.lab import exploits
from reward_fns.score import Reward, RoutedReward, Score, UserReward

ONE = [{"bbox_2d": [100, 100, 300, 300], "point_2d": [200, 200]}]
THREE = [
    {"bbox_2d": [60 + 240 * k, 200, 200 + 240 * k, 420], "point_2d": [130 + 240 * k, 310]}
    for k in range(3)
]
ROWS: dict[str, dict[str, Any]] = {
    "ktg": {"one object": ONE, "three objects": THREE},
    "aks": {"option A": "A", "option B": "B"},
}
EMPTY = "no object"
SLOW_S = 0.1


@dataclass
class ProbeFinding:
    """Result of one exploit on one row."""

    row: str
    exploit: str
    description: str
    earns: float
    """Reward of the exploit."""
    honest: float
    """Reward of the best honest attempt that is not perfect."""
    best: float
    """Reward of the perfect answer."""
    seconds: float
    """Time to score the exploit."""

    @property
    def pays(self) -> bool:
        """True if it earns at least what an honest attempt earns."""
        return self.earns >= self.honest > 0

    @property
    def is_slow(self) -> bool:
        """True if scoring it is slow enough to delay a step."""
        return self.seconds > SLOW_S


def probe(reward: Reward, task: str | None = None) -> list[ProbeFinding]:
    """Run every exploit of the reward's task on every row. Raises InputError.

    Args:
        task: `aks` or `ktg`; needed for a user's function.
    """
    if isinstance(reward, RoutedReward):
        return [f for part in reward.routes.values() for f in probe(part, task)]
    recipe = getattr(reward, "recipe", None)
    task = task or getattr(recipe, "task", None)
    if task not in ROWS:
        is_function = isinstance(reward, UserReward)
        hint = "a user's function needs --task" if is_function else f"this reward is for {task}"
        raise InputError(f"probe supports the tasks aks and ktg; {hint}", key="task")
    library = exploits.KTG if task == "ktg" else exploits.AKS
    honest_of = exploits.honest_ktg if task == "ktg" else exploits.honest_aks
    if getattr(recipe, "response", None) == "answer":
        reward = _WithoutReasoning(reward)
    findings = []
    for row, truth in ROWS[task].items():
        honest = [reward.score(text, truth).reward for text in honest_of(truth).values()]
        best, imperfect = max(honest), max(honest[1:])
        for exploit in library:
            findings.append(_one(reward, row, truth, exploit, imperfect, best))
    if task == "ktg":
        nothing = reward.score(exploits.well_formed([]), []).reward
        invented = exploits.hallucination_on_nothing
        findings.append(_one(reward, EMPTY, [], invented, nothing, nothing))
    return findings


class _WithoutReasoning(Reward):
    """Scores the library's responses without their reasoning, for a reward that refuses it."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def score(self, response: str, ground_truth: Any, /, **kwargs: Any) -> Score:
        """Score the response without the reasoning of `exploits.well_formed`."""
        plain = response.replace(exploits.well_formed("").partition("<answer>")[0], "")
        return self.reward.score(plain, ground_truth, **kwargs)


def _one(
    reward: Reward,
    row: str,
    truth: Any,
    exploit: Callable[[Any], str],
    honest: float,
    best: float,
) -> ProbeFinding:
    response = exploit(truth)
    earns = reward.score(response, truth).reward  # also imports what the timed call needs
    started = time.perf_counter()
    reward.score(response, truth)
    seconds = time.perf_counter() - started
    description = (exploit.__doc__ or "").strip().splitlines()[0]
    return ProbeFinding(row, exploit.__name__, description, earns, honest, best, seconds)


def table(findings: list[ProbeFinding]) -> str:
    """Return a table of all findings; the exploits that pay come first."""
    lines = [f"{'exploit':<26}{'row':<15}{'earns':>7}{'honest':>8}{'perfect':>9}  "]
    for finding in sorted(findings, key=lambda f: (not f.pays, not f.is_slow)):
        mark = "PAYS" if finding.pays else ""
        if finding.is_slow:
            mark += f" {finding.seconds:.2f} s"
        lines.append(
            f"{finding.exploit:<26}{finding.row:<15}{finding.earns:>7.2f}{finding.honest:>8.2f}"
            f"{finding.best:>9.2f}  {mark}"
        )
    pays = [f for f in findings if f.pays]
    lines.append(f"{len(pays)} of {len(findings)} earn what an honest attempt earns")
    lines += [f"  {f.exploit} ({f.row}): {f.description}" for f in pays]
    return "\n".join(lines)
