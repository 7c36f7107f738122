"""A reward that pays for form only is found while it trains, and by the verdict (real stack)."""

from __future__ import annotations

import pytest

from rcot_rl.monitoring.judgement.alert_rules import alerts_of
from rcot_rl.monitoring.judgement.run_verdict import judge_run
from rcot_rl.monitoring.run_files.run_reader import RunReader

STAGE = "grpo-aks"


@pytest.mark.drill
def test_a_reward_that_pays_only_format_is_bad(variant) -> None:
    steps, folder = variant(
        STAGE,
        f"train.{STAGE}.reward=aks-format-only",
        f"train.{STAGE}.steps=16",
        f"train.{STAGE}.learning_rate=2e-4",
        "grpo.prompts_per_step=16",
    )
    assert steps[-1]["step"] == 16
    reader = RunReader(folder.parent)
    # How much form is left to gain depends on SFT. With little, groups soon have equal rewards
    # before the rise reaches the bound of `format_only`.
    alert = alerts_of(reader, STAGE)[0]
    assert alert.code in ("format_only", "zero_variance")
    console = (folder.parents[1] / "console.txt").read_text()
    assert f"alert at step {alert.step}" in console
    verdict = judge_run(reader)
    assert verdict.level == "bad"
    assert "through format alone" in verdict.headline
