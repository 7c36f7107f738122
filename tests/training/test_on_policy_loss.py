"""The loss without a pass for old log-probabilities against verl's loss with one."""

import pytest

pytestmark = pytest.mark.slow

CODE = """
import torch, verl
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, get_policy_loss_fn
from verl.workers.config import FSDPActorConfig
from rcot_rl.training import on_policy_loss
config = FSDPActorConfig(strategy="fsdp2", rollout_n=2, ppo_micro_batch_size_per_gpu=1,
                         ppo_mini_batch_size=4, clip_ratio=0.2)
torch.manual_seed(0)
mask = (torch.rand(4, 9) < 0.7).long()
mask[0] = 0
advantages = torch.randn(4, 1).expand(4, 9)
start = -torch.rand(4, 9)
engine = start + 0.01 * torch.randn(4, 9)
grads, losses = [], []
for function, old in ((compute_policy_loss_vanilla, start),
                      (get_policy_loss_fn("rcot_on_policy"), engine)):
    log_prob = start.clone().requires_grad_()
    loss, metrics = function(old_log_prob=old, log_prob=log_prob, advantages=advantages,
        response_mask=mask, loss_agg_mode="token-mean", config=config, rollout_is_weights=None)
    loss.backward()
    grads.append(log_prob.grad); losses.append(loss.detach())
assert grads[0].abs().max() > 0.01
assert torch.equal(*grads) and torch.equal(*losses), (grads, losses)
gap = (start.exp() - engine.exp()).abs()[mask.bool()].mean()
assert abs(metrics["actor/rollout_probs_diff_mean"] - gap) < 1e-7
assert abs(metrics["actor/entropy"] + start[mask.bool()].mean()) < 1e-6
print("equal")
"""


def test_loss_and_gradient_equal_verls_at_ratio_one(run_verl_python):
    assert run_verl_python(CODE).strip().endswith("equal")
