"""GRPO's loss when each batch gets one update: the old policy is the current one.

With one update per step, the ratio of eq. 15 has the value 1 and only its gradient matters, so the
old log-probabilities are those of the update's own forward pass; verl computes them in a separate
pass. Registered as `actor.policy_loss.loss_mode: rcot_on_policy`, and used with verl's
`rollout_correction.bypass_mode`, which skips that pass and passes the engine's log-probabilities
instead. Those serve as a check here, not in the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo import core_algos

NAME = "rcot_on_policy"

# typed Any: verl types all options of a loss as positional
_register: Any = core_algos.register_policy_loss
_clipped_loss: Any = core_algos.compute_policy_loss_vanilla


@_register(NAME)
def on_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Compute verl's clipped loss at ratio 1.

    Args:
        old_log_prob: [responses, tokens], the rollout engine's; for metrics only.
        log_prob: [responses, tokens], the trainer's, with gradient.

    Returns:
        The loss, and metrics: verl's, the mean difference between the two sides' probabilities, and
        the entropy, which verl logs in the pass that is skipped. The entropy is estimated by the
        mean of -log p over the sampled tokens (unbiased without top-k and top-p).
    """
    current = log_prob.detach()
    loss, metrics = _clipped_loss(current, log_prob, advantages, response_mask, **options)
    mask = response_mask.bool()
    if mask.any():
        gap = (current.exp() - old_log_prob.exp()).abs()
        metrics["actor/rollout_probs_diff_mean"] = gap[mask].mean().item()
        metrics["actor/entropy"] = -current[mask].mean().item()
    return loss, metrics
