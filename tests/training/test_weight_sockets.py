"""Two runs on one host, each with a Ray of its own, do not share the socket of the weight sync."""

from __future__ import annotations

from pathlib import Path

from rcot_rl.recipe.loader import load_recipe
from rcot_rl.training.verl_config import training_environment
from rcot_rl.training.verl_patches import own_socket

VERL = "ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock"


def test_both_ends_agree_and_other_runs_differ(monkeypatch):
    recipe = load_recipe("laptop")
    names = set()
    for attempt in ("runs/a/grpo-aks/attempt-1", "runs/b/grpo-aks/attempt-1"):
        run = training_environment(recipe, Path(attempt))["RCOT_RUN"]
        monkeypatch.setenv("RCOT_RUN", run)
        ends = {own_socket(VERL), own_socket(own_socket(VERL))}
        assert len(ends) == 1
        names |= ends
    assert len(names) == 2
    # a Unix socket's path has at most 107 characters
    assert all(n.startswith("ipc:///tmp/") and len(n) < 107 for n in names)


def test_without_a_run_verls_name_stays(monkeypatch):
    monkeypatch.delenv("RCOT_RUN", raising=False)
    assert own_socket(VERL) == VERL
