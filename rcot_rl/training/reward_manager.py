"""verl's reward manager of this project: a row of a batch to `reward.compute_score` and back.

verl's own (`naive`) waits for a reward without end. Here `compute_score` holds every sample to its
deadline, and what goes to a user's function is the row alone: verl's bookkeeping objects, which may
not be JSON, stay behind. Named in verl's configuration by `reward.reward_manager`.

Left out: reward models; a judge is asked from an async user function.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from rcot_rl.errors import InputError
from rcot_rl.training.reward import load

OUTCOME = "agentic"
"""Where an agentic episode's outcome lies in its output's `extra_fields`."""

FUNCTION = "pkg://rcot_rl.training.reward"


class RCoTRewardManager(RewardManagerBase):
    """Scores one response at a time, any number open at once. Raises InputError."""

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
        # now, for a fault to end the start and not the first step, and an import not to hold it up
        kwargs = config.reward.custom_reward_function.reward_kwargs
        load(kwargs.reward, kwargs.canvas, kwargs.deadline_s)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """`reward_score` and `reward_extra_info` of the last sequence of a trajectory.

        A user's function may take, beside verl's `data_source` and `extra_info`, the number of
        tokens of the response (`response_length`) and of turns (`num_turns`).
        """
        item = data[-1:][0]
        ids = item.batch["responses"]
        length = int(item.batch["attention_mask"][-ids.shape[-1] :].sum())
        fields = item.non_tensor_batch
        # in a thread: the fast tokenizers let go of the interpreter
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
