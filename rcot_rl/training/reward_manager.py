"""verl's reward manager of this project: scores a row of a batch with `reward_function`.

verl's own manager (`naive`) waits for a reward without a limit. Here `compute_score` holds every
sample to its deadline, and a user's function gets only the row: verl's bookkeeping objects, which
may not be JSON, are left out. Named in verl's configuration by `reward.reward_manager`.

Not supported: reward models. A judge is called from an async user function.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from rcot_rl.errors import InputError
from rcot_rl.training.reward_function import load

logger = logging.getLogger(__name__)

OUTCOME = "agentic"
"""Key of an agentic episode's outcome in its output's `extra_fields`."""

FUNCTION = "pkg://rcot_rl.training.reward_function"


class RCoTRewardManager(RewardManagerBase):
    """Scores one response per call; any number of calls may be open at once."""

    tokenizer: Any
    compute_score: Any

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        path = config.reward.custom_reward_function.path
        if path != FUNCTION:
            raise InputError(
                f"must stay {FUNCTION}, not {path}; a reward of your own goes into the recipe, "
                "as grpo.reward=FILE.py:FUNCTION",
                key="reward.custom_reward_function.path",
            )
        super().__init__(config, tokenizer, compute_score)
        # loaded here so that a faulty reward fails the start, not the first step
        kwargs = config.reward.custom_reward_function.reward_kwargs
        for name in {kwargs.reward, *kwargs.get("rehearsed", {}).values()}:
            reward = load(name, kwargs.canvas, kwargs.deadline_s)
            logger.info(
                "reward %s: canvas %d, deadline %g s", reward.name, kwargs.canvas, kwargs.deadline_s
            )

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Score the last sequence of a trajectory.

        A user's function may take, besides verl's `data_source` and `extra_info`, the number of
        tokens of the response (`response_length`) and of turns (`num_turns`). Raises InputError.

        Returns:
            `reward_score`, and `reward_extra_info` with all that `compute_score` returned.
        """
        item = data[-1:][0]
        ids = item.batch["responses"]
        length = int(item.batch["attention_mask"][-ids.shape[-1] :].sum())
        fields = item.non_tensor_batch
        # in a thread: the fast tokenizers release the interpreter lock
        text = await asyncio.get_running_loop().run_in_executor(
            None, lambda: self.tokenizer.decode(ids[:length], skip_special_tokens=True)
        )
        turns = fields.get("__num_turns__")
        truth = fields["reward_model"]["ground_truth"]
        extra = dict(fields.get("extra_info") or {})
        outcome = (fields.get("tool_extra_fields") or {}).get(OUTCOME)
        if outcome is not None:  # the last question was about another frame than the row's
            truth, extra[OUTCOME] = json.dumps(outcome["truth"]), outcome
        result = await self.compute_score(
            data_source=fields["data_source"],
            solution_str=text,
            ground_truth=truth,
            extra_info=extra,
            response_length=length,
            num_turns=None if turns is None else int(turns),
        )
        return {"reward_score": result["score"], "reward_extra_info": result}
