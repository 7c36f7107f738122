"""A killed and resumed stage has the weights of an uninterrupted one, bit for bit.

Rollouts of two runs are the same here because every response has a seed of its own
(`seeded_rollouts.py`): then nothing may differ, neither weights nor the optimizer's moments.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from rcot_rl.training.checkpoint_store import find_checkpoint

pytestmark = pytest.mark.drill

AGENT = "actor_rollout_ref.rollout.agent"
SEEDED = (
    f"grpo.verl={{{AGENT}.agent_loop_manager_class: seeded_rollouts.SeededManager, "
    f"{AGENT}.default_agent_loop: seeded_single_turn}}"
)
SETTINGS = [
    SEEDED,
    "train.grpo-aks.steps=3",
    "grpo.save_every=1",
    "train.grpo-aks.learning_rate=1e-3",
]


def tensors(value, prefix=""):
    """Return name -> tensor of a nested state."""
    import torch

    if isinstance(value, torch.Tensor):
        return {prefix: value.to_local() if hasattr(value, "to_local") else value}
    items = value.items() if isinstance(value, dict) else ()
    return {k: v for key, child in items for k, v in tensors(child, f"{prefix}.{key}").items()}


def states(stage: Path) -> dict:
    import torch

    states_by_name = {}
    checkpoint = find_checkpoint(stage / "checkpoints" / "latest")
    for kind in ("model", "optim"):
        file = checkpoint / "actor" / f"{kind}_world_size_1_rank_0.pt"
        states_by_name |= tensors(torch.load(file, map_location="cpu", weights_only=False), kind)
    return states_by_name


def test_a_killed_stage_ends_with_the_same_weights(branch, start_rcot, monkeypatch):
    import torch

    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    one, words = branch("one", "grpo-aks", *SETTINGS)
    assert start_rcot(*words, stdout=-3, stderr=-3).wait(timeout=900) == 0

    other, words = branch("other", "grpo-aks", *SETTINGS)
    process = start_rcot(*words, stdout=-3, stderr=-3)
    sealed = other / "grpo-aks/checkpoints/global_step_1/checkpoint.json"
    while not sealed.is_file():
        assert process.poll() is None
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "ray::WorkerDict" in " ".join([child.name(), *child.cmdline()]):
            os.kill(child.pid, signal.SIGKILL)
            break
    assert process.wait(timeout=900) == 0
    assert (other / "grpo-aks/attempt-2").is_dir(), "it was killed, and went on by itself"

    straight, resumed = states(one / "grpo-aks"), states(other / "grpo-aks")
    assert straight.keys() == resumed.keys() and any(k.startswith("optim") for k in straight)
    different = [k for k in straight if not torch.equal(straight[k], resumed[k])]
    assert not different, different[:5]
    first = torch.load(
        one / "grpo-aks/checkpoints/global_step_2/actor/model_world_size_1_rank_0.pt",
        weights_only=False,
    )
    moved = [k for k, v in tensors(first, "model").items() if not torch.equal(v, straight[k])]
    assert moved, "a step changes weights: equality says something"
