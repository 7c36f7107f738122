"""Calls of a contract check: recipes and users' functions, here or in a fresh process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reward_fns.lab.contract_report import CheckReport
from reward_fns.score import Reward, UserReward, load_reward
from reward_fns.user.guard import Guard, Result
from reward_fns.user.sources import ModuleSource

if TYPE_CHECKING:
    from reward_fns.components.mask_iou import MaskSegmenter


@dataclass(frozen=True)
class RewardCall:
    """Arguments of one call."""

    name: str
    response: str
    ground_truth: Any
    row: dict[str, Any]


def call_of(name: str, response: str, ground_truth: Any, row: dict[str, Any]) -> RewardCall:
    """Build a call with the keys that training adds: response length (here, words) and turns."""
    added = {"response_length": len(response.split()) + 1, "num_turns": 2}
    return RewardCall(name, response, ground_truth, row | added)


class Runner:
    """Calls a recipe or a user's function in the same way and reports failures."""

    def __init__(
        self,
        reward: Reward,
        spec: str,
        canvas: int | None,
        overrides: Mapping[str, Any] | None = None,
        segmenter: MaskSegmenter | None = None,
    ) -> None:
        self.reward, self.spec, self.canvas = reward, spec, canvas
        self.overrides, self.segmenter = overrides, segmenter

    def run(self, case: RewardCall) -> Result:
        """Make one call. Never raises."""
        return self.run_all([case])[0]

    def run_all(self, cases: Sequence[RewardCall]) -> list[Result]:
        """Make all calls, in one batch if the reward supports it."""
        if isinstance(self.reward, UserReward):
            samples = [self.reward.sample(c.response, c.ground_truth, c.row) for c in cases]
            return self.reward.guard.call(samples)
        return [_recipe_result(self.reward, case) for case in cases]

    def run_fresh(self, cases: Sequence[RewardCall]) -> list[Result]:
        """Make the calls one by one in a process that has scored nothing yet.

        A segmenter cannot move to another process; a recipe with one is reloaded here instead.
        """
        if isinstance(self.reward, UserReward):
            self.reward.close()
            return [self.run(case) for case in cases]
        if self.segmenter is not None:
            fresh = load_reward(
                self.spec,
                canvas=self.canvas,
                overrides=self.overrides,
                segmenter=self.segmenter,
            )
            return [_recipe_result(fresh, case) for case in cases]
        # a recipe runs in the guard too, as a user's function
        source = ModuleSource(self.spec, __name__, "score_recipe")
        constants = {
            "reward_spec": self.spec,
            "reward_canvas": self.canvas,
            "reward_overrides": dict(self.overrides) if self.overrides else None,
        }
        guard = Guard(source, constants, 60.0)
        try:
            return [guard.call([[c.response, c.ground_truth, c.row]])[0] for c in cases]
        finally:
            guard.close()

    @property
    def deadline_s(self) -> float | None:
        """Deadline of a call; None for a recipe."""
        return self.reward.deadline_s if isinstance(self.reward, UserReward) else None

    def describe(self, report: CheckReport) -> None:
        """Report how the reward is called."""
        if not isinstance(self.reward, UserReward):
            names = ", ".join(self.reward.component_names)
            report.add("ok", "kind", f"recipe with the components {names}")
            return
        traits = self.reward.guard.traits
        kind = ("async " if traits.is_async else "") + ("batch" if traits.batch else "one sample")
        keys = "any" if traits.row_keys is None else ", ".join(sorted(traits.row_keys)) or "none"
        report.add("ok", "kind", f"{kind}, {traits.style} arguments; keys of the row: {keys}")

    def close(self) -> None:
        """End the process of a user's function."""
        if isinstance(self.reward, UserReward):
            self.reward.close()


def score_recipe(
    response: str,
    ground_truth: Any,
    *,
    reward_spec: str,
    reward_canvas: int | None = None,
    reward_overrides: dict[str, Any] | None = None,
    **row: Any,
) -> dict[str, Any]:
    """Score with a recipe; a user's function that the guard runs in a fresh process."""
    reward = load_reward(reward_spec, canvas=reward_canvas, overrides=reward_overrides)
    score = reward.score(response, ground_truth, **row)
    # "reasons" and the total have names of their own, whatever the components are called
    return {"reward": score.reward, **score.components, "reasons": score.reasons}


def _recipe_result(reward: Reward, case: RewardCall) -> Result:
    try:
        score = reward.score(case.response, case.ground_truth, **case.row)
    except Exception as error:
        kind = type(error).__name__
        return Result(0.0, failed=["raised", f"raised:{kind}"], message=f"{kind}: {error}")
    return Result(score.reward, score.components, score.reasons)
