"""GRPO's loss where each batch gets one update: the old policy is the current one.

With one update a step, the ratio of eq. 15 is 1 in value and only its gradient matters, so that the
old log-probabilities are those of the update's own forward pass. verl computes them in a pass of
its own first. Registered as `actor.policy_loss.loss_mode: rcot_on_policy`, and used with verl's
`rollout_correction.bypass_mode`, which leaves that pass out and hands over the engine's
log-probabilities instead. Those serve as a check here, not in the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, register_policy_loss

NAME = "rcot_on_policy"


@register_policy_loss(NAME)
def on_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl's clipped loss at ratio 1.

    Args:
        old_log_prob: the rollout engine's log-probabilities [responses, tokens]; for metrics only.
        log_prob: the trainer's, with gradient, of the same shape.
        advantages, response_mask: of the same shape.
        options: what verl passes to every policy loss.

    Returns:
        The loss, and metrics: verl's, the mean difference between the two sides' probabilities, and
        the entropy, which verl logs in the pass that is left out. The entropy is estimated by the
        mean of -log p over the sampled tokens (unbiased without top-k and top-p).
    """
    current = log_prob.detach()
    loss, metrics = compute_policy_loss_vanilla(
        current, log_prob, advantages, response_mask, **options
    )
    mask = response_mask.bool()
    if mask.any():
        gap = (current.exp() - old_log_prob.exp()).abs()
        metrics["actor/rollout_probs_diff_mean"] = gap[mask].mean().item()
        metrics["actor/entropy"] = -current[mask].mean().item()
    return loss, metrics
